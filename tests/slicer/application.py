"""As much of the Slicer application as a scripted module's widget asks for, over ``headless`` and ``pythonqt``."""

from __future__ import annotations

import functools
import importlib.util
import sys
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
        self.window = QtWidgets.QMainWindow()
        slicer.qMRMLWidget = pythonqt.qMRMLWidget
        slicer.app = types.SimpleNamespace(
            layoutManager=lambda: _LayoutManager(self.headless), processEvents=QtWidgets.QApplication.processEvents
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
        words.tr = lambda text: text
        words.translate = lambda context, text: text
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


class _ModuleTest(unittest.TestCase):
    def delayDisplay(self, text: str) -> None:  # noqa: N802
        QtWidgets.QApplication.processEvents()


class _LayoutManager:
    def __init__(self, app: headless.HeadlessSlicer) -> None:
        self.headless = app

    def setLayout(self, layout) -> None:  # noqa: N802
        self.headless.layout = layout

    def sliceViewNames(self):  # noqa: N802
        return ["Red"]

    def sliceWidget(self, name: str):  # noqa: N802
        view = self.headless.view(name)
        return types.SimpleNamespace(mrmlSliceNode=lambda: view.node, sliceLogic=lambda: view.logic)
