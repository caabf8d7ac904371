"""As much of the Slicer application as a scripted module's widget asks for, over ``headless`` and ``pythonqt``."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
import time
import types
import unittest
from pathlib import Path

import headless
import pythonqt
import slicer
from PySide6 import QtCore, QtWidgets

MODULE = Path(__file__).parents[2] / "slicer_module" / "PulmonaryEmbolism"


class Application:
    """One application a test session. ``messages`` are the sentences of the status bar."""

    def __init__(self) -> None:
        self.qapp, self.qt = pythonqt.install()
        QtCore.QStandardPaths.setTestModeEnabled(True)
        QtCore.QSettings.setDefaultFormat(QtCore.QSettings.Format.IniFormat)
        self.qapp.setOrganizationName("pe-test")
        self.qapp.setApplicationName("Slicer")
        self.headless = headless.instance()
        self.messages: list[str] = []
        self.off_main: list[str] = []
        self.at_startup: list = []
        self.window = QtWidgets.QMainWindow()
        slicer.qMRMLWidget = pythonqt.qMRMLWidget
        self.manager = _LayoutManager(self.headless)
        slicer.app = types.SimpleNamespace(
            layoutManager=lambda: self.manager,
            connect=self._connect,
            processEvents=QtWidgets.QApplication.processEvents,
        )
        util = types.ModuleType("slicer.util")
        util.VTKObservationMixin = _ObservationMixin
        util.mainWindow = lambda: self.window
        util.showStatusMessage = lambda text, duration=0: self.messages.append(text)
        util.loadUI = _load_ui
        util.childWidgetVariables = lambda root: types.SimpleNamespace(
            **{w.objectName: w for w in [root, *root.findChildren(QtWidgets.QWidget)] if w.objectName}
        )
        base = types.ModuleType("slicer.ScriptedLoadableModule")
        for cls in (_Module, _ModuleWidget, _ModuleTest):
            setattr(base, "ScriptedLoadable" + cls.__name__[1:], cls)
        words = types.ModuleType("slicer.i18n")
        words.tr = self._translated
        words.translate = lambda context, text: self._translated(text)
        for name, module in (("util", util), ("ScriptedLoadableModule", base), ("i18n", words)):
            setattr(slicer, name, module)
            sys.modules[f"slicer.{name}"] = module
        sys.path.insert(0, str(MODULE))

    def load(self):
        """The module's widget, set up and entered."""
        spec = importlib.util.spec_from_file_location("PulmonaryEmbolism", MODULE / "PulmonaryEmbolism.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.module = module
        self.entry = module.PulmonaryEmbolism(types.SimpleNamespace())
        host = pythonqt.qMRMLWidget()
        QtWidgets.QVBoxLayout(host).setContentsMargins(0, 0, 0, 0)
        self.window.setCentralWidget(host)
        widget = module.PulmonaryEmbolismWidget(host)
        widget.setup()
        self.window.resize(470, 900)
        self.window.show()
        self.window.activateWindow()
        widget.enter()
        return widget

    def unload(self, widget) -> None:
        widget.exit()
        widget.cleanup()
        self.window.takeCentralWidget().deleteLater()
        self.settle(1)
        self.headless.clear()

    def _translated(self, text: str) -> str:
        """Slicer asks Qt's translators, which belong to the main thread."""
        if threading.current_thread() is not threading.main_thread():
            self.off_main.append(text)
        return text

    def _connect(self, signature: str, handler) -> None:
        """Slicer's application has started already when a module is loaded here: tests call the handlers."""
        if signature != "startupCompleted()":
            raise AttributeError(f"the application has no signal {signature}")
        self.at_startup.append(handler)

    def settle(self, milliseconds: int = 30) -> None:
        """Let the event loop run."""
        loop = QtCore.QEventLoop()
        QtCore.QTimer.singleShot(milliseconds, loop.quit)
        loop.exec()

    def wait(self, ready, seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                raise TimeoutError("what the test waits for did not come")
            self.settle(10)


@functools.cache
def instance() -> Application:
    """The one of this process."""
    return Application()


def _load_ui(path: str):
    file = QtCore.QFile(str(path))
    file.open(QtCore.QFile.OpenModeFlag.ReadOnly)
    return pythonqt.UiLoader().load(file)


class _ObservationMixin:
    def __init__(self) -> None:
        self.observed = []

    def addObserver(self, node, event, method) -> None:  # noqa: N802
        self.observed.append((node, node.AddObserver(event, method)))

    def removeObservers(self) -> None:  # noqa: N802
        for node, tag in self.observed:
            node.RemoveObserver(tag)
        self.observed = []


class _Module:
    def __init__(self, parent) -> None:
        self.parent = parent


class _ModuleWidget:
    def __init__(self, parent) -> None:
        self.parent = parent
        self.layout = parent.layout()

    def resourcePath(self, name: str) -> str:  # noqa: N802
        return str(MODULE / "Resources" / name)

    def setup(self) -> None:
        pass

    def onReload(self) -> None:  # noqa: N802
        self.reloaded = True


class _ModuleTest(unittest.TestCase):
    def delayDisplay(self, text: str) -> None:  # noqa: N802
        QtWidgets.QApplication.processEvents()


class _LayoutManager:
    """Three slice views, of which the axial one is drawn whenever it has changed, as Slicer does."""

    VIEWS = (("Red", "Axial"), ("Green", "Coronal"), ("Yellow", "Sagittal"))

    def __init__(self, app: headless.HeadlessSlicer) -> None:
        self.headless = app
        self.layouts = slicer.vtkMRMLLayoutNode()
        size = (640, 640) if os.environ.get("PE_SCREENSHOTS") else (128, 128)
        for name, orientation in self.VIEWS:
            app.view(name, orientation, size)
        self.views = {name: _SliceView(app.view(name)) for name, _ in self.VIEWS}
        red = self.views["Red"]
        shown = app.view("Red")
        for changed in (shown.node, shown.logic.GetSliceCompositeNode()):
            changed.AddObserver("ModifiedEvent", lambda *_event: red.scheduleRender())

    def layoutLogic(self):  # noqa: N802
        return types.SimpleNamespace(GetLayoutNode=lambda: self.layouts)

    def setLayout(self, layout) -> None:  # noqa: N802
        if layout > 100 and not self.layouts.IsLayoutDescription(layout):
            raise ValueError(f"there is no layout {layout}")
        self.layout = layout

    def sliceViewNames(self):  # noqa: N802
        return tuple(self.views)

    def sliceWidget(self, name: str):  # noqa: N802
        view = self.headless.view(name)
        return types.SimpleNamespace(
            mrmlSliceNode=lambda: view.node, sliceLogic=lambda: view.logic, sliceView=lambda: self.views[name]
        )


class _SliceView:
    def __init__(self, view) -> None:
        self.view = view
        self.frozen = False  # as when Slicer is too busy to draw
        self._due = False

    def renderWindow(self):  # noqa: N802
        return self.view.window

    def interactor(self):
        return self.view.interactor

    def scheduleRender(self) -> None:  # noqa: N802
        if not self._due and not self.frozen:
            self._due = True
            QtCore.QTimer.singleShot(0, self.forceRender)

    def forceRender(self) -> None:  # noqa: N802
        self._due = False
        self.view.render()
