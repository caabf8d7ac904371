"""Slicer's ``qt`` and ``ctk`` over PySide6, as strict as it can be, so that the panel runs and is clicked in a test.

PythonQt differs from PySide6 in what this module makes up for:

* Qt properties are attributes: ``label.text = "x"``, ``combo.count``, ``widget.enabled``;
* signals are connected by their C++ signature: ``button.connect("clicked()", handler)``;
* ``qt`` is one flat module, and some methods are called ``exec_``.

An unknown signal, an unknown attribute or a widget class without a stand-in raises: what passes here by accident would
fail in Slicer. What real ctk and qMRML widgets do on screen is not imitated.
"""

from __future__ import annotations

import inspect
import os
import sys
import types

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets

_MODULES = (QtCore, QtGui, QtWidgets)
_VIRTUAL = {"sizeHint", "minimumSizeHint"}  # properties that Qt itself calls as methods


class _Attribute:
    """A Qt property as an attribute of instances; on the class, what PySide6 has there."""

    def __init__(self, name, original, setter) -> None:
        self.name, self.original, self.setter = name, original, setter

    def __get__(self, instance, owner=None):
        if instance is None:
            return self.original.__get__(None, owner) if hasattr(self.original, "__get__") else self.original
        return self.original(instance) if callable(self.original) else instance.property(self.name)

    def __set__(self, instance, value) -> None:
        if self.setter is None:
            raise AttributeError(f"{type(instance).__name__}.{self.name} is read-only")
        self.setter(instance, value)


def _give_attributes(cls: type) -> None:
    meta = getattr(cls, "staticMetaObject", None)
    if meta is None or meta.className() != cls.__name__:
        return
    for index in range(meta.propertyOffset(), meta.propertyCount()):
        described = meta.property(index)
        name = described.name()
        current = cls.__dict__.get(name)
        if name in _VIRTUAL or isinstance(current, (property, QtCore.Property, _Attribute, staticmethod)):
            continue
        setter = getattr(cls, "set" + name[0].upper() + name[1:], None)
        if setter is None and described.isWritable():
            setter = lambda instance, value, name=name: instance.setProperty(name, value)  # noqa: E731
        if name != "singleShot":  # also a static method
            setattr(cls, name, _Attribute(name, current, setter))


def _signal(instance, signature: str):
    name, _, arguments = signature.rstrip(")").partition("(")
    signal = getattr(instance, name, None)
    if not hasattr(signal, "emit"):
        raise AttributeError(f"{type(instance).__name__} has no signal {signature}")
    if arguments:
        try:
            return signal[arguments]
        except (KeyError, IndexError, TypeError):
            return signal
    return signal


def _connect(instance, signature: str, receiver) -> bool:
    """As PythonQt: as many arguments as the signature names, at most as many as the receiver takes."""
    named = 0 if signature.endswith("()") else signature.count(",") + 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = sum(parameter.kind in kinds for parameter in inspect.signature(receiver).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in inspect.signature(receiver).parameters.values()):
        taken = named
    _signal(instance, signature).connect(lambda *values: receiver(*values[: min(named, taken)]))
    return True


def _connectable(lookup):
    """PySide6 finds ``connect`` before any class attribute, so the lookup itself is wrapped."""

    def found(self, name):
        value = lookup(self, name)
        if name != "connect":
            return value

        def connect(*arguments):
            by_signature = isinstance(arguments[0], str) and not arguments[0][:1].isdigit()
            return _connect(self, *arguments) if by_signature else value(*arguments)

        return connect

    return found


class Widget(QtWidgets.QWidget):
    """Base of the stand-ins; knows the scene as Slicer's widgets do."""

    mrmlSceneChanged = QtCore.Signal(object)  # noqa: N815

    def setMRMLScene(self, scene) -> None:  # noqa: N802
        self.scene = scene
        self.mrmlSceneChanged.emit(scene)

    def setProperty(self, name, value):  # noqa: N802
        if self.metaObject().indexOfProperty(name) < 0:
            raise AttributeError(f"{type(self).__name__} has no property {name}")
        return super().setProperty(name, value)


class ctkCollapsibleButton(Widget):  # noqa: N801
    contentsCollapsed = QtCore.Signal(bool)  # noqa: N815
    HEADER = 24

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._text, self._collapsed = "", False
        self.setContentsMargins(0, self.HEADER, 0, 0)

    def _set_text(self, text) -> None:
        self._text = text
        self.update()

    def _set_collapsed(self, collapsed) -> None:
        self._collapsed = collapsed
        for child in self.children():
            if isinstance(child, QtWidgets.QWidget):
                child.setVisible(not collapsed)
        self.setMaximumHeight(self.HEADER if collapsed else 16777215)
        self.contentsCollapsed.emit(collapsed)

    text = QtCore.Property(str, lambda self: self._text, _set_text)
    collapsed = QtCore.Property(bool, lambda self: self._collapsed, _set_collapsed)

    def mousePressEvent(self, event) -> None:  # noqa: N802
        if event.position().y() < self.HEADER:
            self._set_collapsed(not self._collapsed)

    def paintEvent(self, event) -> None:  # noqa: N802
        painter = QtGui.QPainter(self)
        painter.fillRect(0, 0, self.width, self.HEADER - 2, QtGui.QColor("#d5dbe3"))
        painter.setPen(QtGui.QColor("#1c2733" if self.enabled else "#8a949e"))
        painter.drawText(8, 16, ("▸  " if self._collapsed else "▾  ") + self._text)
        painter.end()


class ctkSliderWidget(Widget):  # noqa: N801
    valueChanged = QtCore.Signal(float)  # noqa: N815

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._slider, self._box = QtWidgets.QSlider(QtCore.Qt.Orientation.Horizontal), QtWidgets.QDoubleSpinBox()
        row = QtWidgets.QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self._slider)
        row.addWidget(self._box)
        self._slider.setRange(0, 100)
        self._box.valueChanged.connect(lambda value: self._slider.setValue(round(100 * value / self._box.maximum)))
        self._box.valueChanged.connect(self.valueChanged)
        self._slider.valueChanged.connect(lambda value: self._box.setValue(value * self._box.maximum / 100))

    value = QtCore.Property(float, lambda self: self._box.value, lambda self, value: self._box.setValue(value))
    maximum = QtCore.Property(float, lambda self: self._box.maximum, lambda self, value: self._box.setMaximum(value))
    singleStep = QtCore.Property(  # noqa: N815
        float, lambda self: self._box.singleStep, lambda self, value: self._box.setSingleStep(value)
    )
    decimals = QtCore.Property(int, lambda self: self._box.decimals, lambda self, value: self._box.setDecimals(value))


class qMRMLWidget(Widget):  # noqa: N801
    pass


class qMRMLSegmentEditorWidget(Widget):  # noqa: N801
    """Keeps its node and what was asked of it; shows a placeholder of the editor's size."""

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self.node, self.effect, self.observing, self.keys, self.effects = None, None, False, False, []
        column = QtWidgets.QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        label = QtWidgets.QLabel("Segment Editor: Paint  Draw  Erase  Threshold  Islands")
        label.setMinimumHeight(34)
        label.setAlignment(QtCore.Qt.AlignmentFlag.AlignCenter)
        label.setStyleSheet("background: #eef2f6; border: 1px dashed #9aa3ad; color: #5b6770;")
        column.addWidget(label)

    for _name in ("segmentationNodeSelector", "sourceVolumeNodeSelector", "switchToSegmentationsButton",
                  "addRemoveSegmentButtons", "maskingSection", "unorderedEffects"):  # fmt: skip
        vars()[_name + "Visible"] = QtCore.Property(bool, lambda self: True, lambda self, value: None)

    def setMRMLSegmentEditorNode(self, node) -> None:  # noqa: N802
        self.node = node

    def setEffectNameOrder(self, names) -> None:  # noqa: N802
        self.effects = names

    def setMaximumNumberOfUndoStates(self, number) -> None:  # noqa: N802
        pass

    def setActiveEffect(self, effect) -> None:  # noqa: N802
        self.effect = effect

    def installKeyboardShortcuts(self) -> None:  # noqa: N802
        self.keys = True

    def uninstallKeyboardShortcuts(self) -> None:  # noqa: N802
        self.keys = False

    def setupViewObservations(self) -> None:  # noqa: N802
        self.observing = True

    def removeViewObservations(self) -> None:  # noqa: N802
        self.observing = False


STAND_INS = {
    cls.__name__: cls for cls in (ctkCollapsibleButton, ctkSliderWidget, qMRMLWidget, qMRMLSegmentEditorWidget)
}


class UiLoader(QtUiTools.QUiLoader):
    def createWidget(self, name, parent=None, object_name=""):  # noqa: N802
        if name in STAND_INS:
            widget = STAND_INS[name](parent)
            widget.setObjectName(object_name)
            return widget
        widget = super().createWidget(name, parent, object_name)
        if widget is None:
            raise RuntimeError(f"the widget class {name} ({object_name}) has no stand-in")
        return widget


def install():
    """Put ``qt`` and ``ctk`` among the modules; returns (application, qt)."""
    application = QtWidgets.QApplication.instance() or QtWidgets.QApplication(["Slicer"])
    application.setStyle("Fusion")
    qt = types.ModuleType("qt")
    for module in _MODULES:
        for name in dir(module):  # PySide6 makes its classes when they are asked for
            if not name.startswith("__"):
                setattr(qt, name, getattr(module, name))
    classes = [value for value in vars(qt).values() if isinstance(value, type) and issubclass(value, QtCore.QObject)]
    for cls in classes:
        _give_attributes(cls)
    for cls in classes:
        if "__getattribute__" in cls.__dict__ or cls is QtCore.QObject:
            cls.__getattribute__ = _connectable(cls.__getattribute__)
    QtWidgets.QDialog.exec_ = QtWidgets.QDialog.exec
    qt.QUiLoader = UiLoader
    ctk = types.ModuleType("ctk")
    for name, cls in STAND_INS.items():
        if name.startswith("ctk"):
            setattr(ctk, name, cls)
    sys.modules["qt"], sys.modules["ctk"] = qt, ctk
    return application, qt
