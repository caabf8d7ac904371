"""Slicer's ``qt`` and ``ctk`` over PySide6, as strict as it can be, so that the panel runs and is clicked in a test.

PythonQt differs from PySide6 in what this module makes up for:

* Qt properties are attributes: ``label.text = "x"``, ``combo.count``, ``widget.enabled``;
* signals are connected by their C++ signature: ``button.connect("clicked()", handler)``;
* ``qt`` is one flat module, and some methods are called ``exec_``.

An unknown signal or signature, an unknown attribute or a widget class without a stand-in raises: what passes here by
accident would fail in Slicer. What real ctk and qMRML widgets do on screen is not imitated.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types

import headless  # noqa: F401  (before Qt and vtk: see there)
import slicer
import vtk
from vtk.util import numpy_support

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
    """The signal of exactly this signature. PythonQt looks it up by its C++ text and refuses any other."""
    name, _, arguments = signature.rstrip(")").partition("(")
    normalised = QtCore.QMetaObject.normalizedSignature(signature).data().decode()
    there = instance.metaObject()
    if there.indexOfSignal(normalised) < 0:
        known = [there.method(i) for i in range(there.methodCount())]
        signals = {m.methodSignature().data().decode() for m in known if m.methodType() == m.MethodType.Signal}
        alike = sorted(other for other in signals if other.startswith(name + "("))
        raise AttributeError(f"{type(instance).__name__} has no signal {signature}; there is {alike}")
    signal = getattr(instance, name)
    try:
        return signal[arguments] if arguments else signal
    except (KeyError, IndexError, TypeError):
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


class Effect:
    """What a Segment Editor effect lets a script do: know its name and set parameters that it has."""

    PARAMETERS = ("BrushDiameterIsRelative", "BrushAbsoluteDiameter", "BrushRelativeDiameter", "BrushSphere",
                  "BrushPixelMode", "EraseAllSegments", "ColorSmudge")  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.parameters: dict[str, object] = {}

    def setCommonParameter(self, name: str, value) -> None:  # noqa: N802
        if name not in self.PARAMETERS:
            raise AttributeError(f"the effect {self.name} has no parameter {name}")
        if not isinstance(value, (int, float, str)):
            raise TypeError(f"a parameter is a number or a text, got {value!r}")
        self.parameters[name] = value


class qMRMLSegmentEditorWidget(Widget):  # noqa: N801
    """Slicer's editor without its looks: its effects, its keys, and the real ``vtkSegmentationHistory``.

    The box is as high as the editor is in Slicer with Paint chosen, so that pictures show what fits.
    """

    HEIGHT = 400

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self.history = slicer.vtkSegmentationHistory()
        self.node, self.observing, self.shortcuts, self.effects = None, False, [], {}
        self._active, self._tag = None, None
        column = QtWidgets.QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        label = QtWidgets.QLabel("Slicer's Segment Editor\nPaint   Draw   Erase")
        label.setMinimumHeight(self.HEIGHT)
        label.setAlignment(QtCore.Qt.AlignmentFlag.AlignCenter)
        label.setStyleSheet("background: #eef2f6; border: 1px dashed #9aa3ad; color: #5b6770;")
        column.addWidget(label)

    for _name in ("segmentationNodeSelector", "sourceVolumeNodeSelector", "switchToSegmentationsButton",
                  "addRemoveSegmentButtons", "maskingSection", "unorderedEffects"):  # fmt: skip
        vars()[_name + "Visible"] = QtCore.Property(bool, lambda self: True, lambda self, value: None)

    def setMRMLSegmentEditorNode(self, node) -> None:  # noqa: N802
        if self.node is not None:
            self.node.RemoveObserver(self._tag)
        self.node = node
        if node is not None:
            self._tag = node.AddObserver("ModifiedEvent", lambda *_event: self._follow())
        self._follow()

    def _follow(self) -> None:
        held = self.node.GetSegmentationNode() if self.node is not None else None
        segmentation = held.GetSegmentation() if held is not None else None
        if self.history.GetSegmentation() is not segmentation:
            self.history.SetSegmentation(segmentation)

    # --- effects

    def setEffectNameOrder(self, names) -> None:  # noqa: N802
        self.effects = {name: Effect(name) for name in names}

    def effectByName(self, name: str):  # noqa: N802
        return self.effects.get(name)

    def activeEffect(self):  # noqa: N802
        return self._active

    def setActiveEffect(self, effect) -> None:  # noqa: N802
        if effect is not None and not isinstance(effect, Effect):
            raise ValueError(f"setActiveEffect takes an effect or None, got {effect!r}")
        self._active = effect

    def setActiveEffectByName(self, name: str) -> None:  # noqa: N802
        self.setActiveEffect(self.effectByName(name))

    def stroke(self, mask, erase: bool = False) -> None:
        """Paint (slice, row, column) as the active effect does: undo state first, then Slicer's own editing logic."""
        if self._active is None:
            return
        logic = slicer.vtkSlicerSegmentEditorLogic()
        logic.SetMRMLScene(self.scene)
        logic.SetSegmentEditorNode(self.node)
        self.saveStateForUndo()
        volume = self.node.GetSourceVolumeNode()
        matrix = vtk.vtkMatrix4x4()
        volume.GetIJKToRASMatrix(matrix)
        dab = slicer.vtkOrientedImageData()
        dab.SetDimensions(*mask.shape[::-1])
        dab.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 1)
        dab.SetImageToWorldMatrix(matrix)
        numpy_support.vtk_to_numpy(dab.GetPointData().GetScalars())[:] = mask.astype("uint8").ravel()
        logic.UpdateReferenceGeometryImage()
        logic.ResetModifierLabelmapToDefault()
        mode = logic.ModificationModeRemove if erase else logic.ModificationModeAdd
        selected = self.node.GetSelectedSegmentID()
        logic.ModifySegmentByLabelmap(self.node.GetSegmentationNode(), selected, dab, mode, False, False)

    # --- undo

    def setMaximumNumberOfUndoStates(self, number) -> None:  # noqa: N802
        self.history.SetMaximumNumberOfStates(number)

    def saveStateForUndo(self) -> None:  # noqa: N802
        self.history.SaveState()

    def undo(self) -> None:
        self.history.RestorePreviousState()

    def redo(self) -> None:
        self.history.RestoreNextState()

    # --- keys

    def installKeyboardShortcuts(self, parent=None) -> None:  # noqa: N802
        self.uninstallKeyboardShortcuts()
        window = parent or self.window()
        pairs = [(str(n + 1), functools.partial(self._toggle, n)) for n in range(10)]
        pairs += [("z", self.undo), ("y", self.redo), ("i", self._toggle_intensity_mask), ("q", None), ("w", None),
                  ("Esc", lambda: self.setActiveEffect(None)), ("Space", None)]  # fmt: skip
        for sequence, handler in pairs:
            shortcut = QtGui.QShortcut(QtGui.QKeySequence(sequence), window)
            shortcut.activated.connect(handler or (lambda: None))
            self.shortcuts.append(shortcut)

    def uninstallKeyboardShortcuts(self) -> None:  # noqa: N802
        for shortcut in self.shortcuts:
            shortcut.setEnabled(False)
            shortcut.deleteLater()
        self.shortcuts = []

    @property
    def keys(self) -> bool:
        return bool(self.shortcuts)

    def _toggle(self, number: int) -> None:
        effect = dict(enumerate(self.effects.values())).get(number)
        self.setActiveEffect(None if effect is self._active else effect)

    def _toggle_intensity_mask(self) -> None:
        self.node.SetSourceVolumeIntensityMask(not self.node.GetSourceVolumeIntensityMask())

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
