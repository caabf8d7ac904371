"""As much of the Slicer application as MRML code needs: a scene, logics, and slice views that render offscreen.

Stands on the PyPI package ``slicer-core``, which holds Slicer's own MRML libraries.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import types
from pathlib import Path

os.environ.setdefault("ITK_GLOBAL_DEFAULT_THREADER", "Platform")
os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's software renderer: small pictures, many test processes

# torch's compiler and Mesa's software renderer both carry LLVM. Loaded after Mesa, triton would bind to Mesa's LLVM
# and crash the process; so it goes first, where it is installed.
with contextlib.suppress(ImportError):
    importlib.import_module("triton._C.libtriton")

import slicer
import vtk

_LOGICS = {
    "colors": "vtkMRMLColorLogic",
    "volumes": "vtkSlicerVolumesLogic",
    "terminologies": "vtkSlicerTerminologiesModuleLogic",
    "segmentations": "vtkSlicerSegmentationsModuleLogic",
    "subjecthierarchy": "vtkSlicerSubjectHierarchyModuleLogic",
    "markups": "vtkSlicerMarkupsLogic",
}


@functools.cache
def instance() -> HeadlessSlicer:
    """The one of this process: Slicer's factories are singletons. It is taken down when Python ends."""
    app = HeadlessSlicer()
    atexit.register(app.shutdown)
    return app


class HeadlessSlicer:
    """One scene with its logics; ``clear`` it between tests."""

    def __init__(self) -> None:
        vtk.vtkObject.GlobalWarningDisplayOff()  # "bad X server connection" on every machine without a display
        self.scene = slicer.vtkMRMLScene()
        crosshair = slicer.vtkMRMLCrosshairNode()
        crosshair.SetCrosshairName("default")
        self.scene.AddNode(crosshair)
        self.logic = slicer.vtkSlicerApplicationLogic()
        self.logic.SetMRMLScene(self.scene)
        self.logic.GetColorLogic().SetMRMLScene(self.scene)
        self.logic.GetColorLogic().AddDefaultColorNodes()
        self.logic.SetSliceLogics(vtk.vtkCollection())
        self.logic.SetViewLogics(vtk.vtkCollection())
        slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(self.scene, True)
        self.factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        self.factory.SetMRMLApplicationLogic(self.logic)
        self.logics = {}
        for name, kind in _LOGICS.items():
            logic = getattr(slicer, kind)()
            logic.SetMRMLScene(self.scene)
            logic.SetMRMLApplicationLogic(self.logic)
            self.logic.SetModuleLogic(name.capitalize(), logic)
            self.logics[name] = logic
        slicer.mrmlScene = self.scene
        slicer.modules = types.SimpleNamespace(
            **{name: types.SimpleNamespace(logic=lambda logic=logic: logic) for name, logic in self.logics.items()}
        )
        self.views: dict[str, SliceView] = {}

    def view(self, name: str = "Red", orientation: str = "Axial", size: tuple[int, int] = (512, 512)) -> SliceView:
        if name not in self.views:
            self.views[name] = SliceView(self, name, orientation, size)
        return self.views[name]

    def clear(self) -> None:
        """Take away what a test added: everything but views, colours and singletons."""
        for kind in (
            "vtkMRMLSegmentationNode",
            "vtkMRMLScalarVolumeNode",
            "vtkMRMLMarkupsNode",
            "vtkMRMLSegmentEditorNode",
        ):
            nodes = self.scene.GetNodesByClass(kind)
            nodes.UnRegister(None)
            for i in range(nodes.GetNumberOfItems()):
                self.scene.RemoveNode(nodes.GetItemAsObject(i))

    def shutdown(self) -> None:
        """In this order the interpreter ends without a crash."""
        for view in self.views.values():
            view.close()
        self.scene.Clear(True)
        for logic in self.logics.values():
            logic.SetMRMLScene(None)
        self.logics.clear()
        slicer.modules = types.SimpleNamespace()


class SliceView:
    """A slice view without Qt: slice logic and displayable managers, rendered offscreen by EGL or OSMesa."""

    MANAGERS = (
        "vtkMRMLModelSliceDisplayableManager",
        "vtkMRMLSegmentationsDisplayableManager2D",
        "vtkMRMLMarkupsDisplayableManager",
        "vtkMRMLRulerDisplayableManager",
    )

    def __init__(self, app: HeadlessSlicer, name: str, orientation: str, size: tuple[int, int]) -> None:
        self.size = size
        self.window = vtk.vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.SetSize(*size)
        self.renderer = vtk.vtkRenderer()
        self.renderer.GetActiveCamera().ParallelProjectionOn()
        self.window.AddRenderer(self.renderer)
        self.interactor = vtk.vtkGenericRenderWindowInteractor()
        self.interactor.SetRenderWindow(self.window)
        self.interactor.Initialize()
        self.interactor.SetInteractorStyle(vtk.vtkInteractorStyleUser())
        self.group = slicer.vtkMRMLDisplayableManagerGroup()
        for manager in self.MANAGERS:
            if not app.factory.IsDisplayableManagerRegistered(manager):
                app.factory.RegisterDisplayableManager(manager)
        self.group.Initialize(app.factory, self.renderer)
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLApplicationLogic(app.logic)
        app.logic.GetSliceLogics().AddItem(self.logic)
        self.logic.SetMRMLScene(app.scene)
        self.node = self.logic.AddSliceNode(name)
        self.node.SetOrientation(orientation)
        self.node.SetMappedInLayout(1)
        self.group.SetMRMLDisplayableNode(self.node)
        self.mapper = vtk.vtkImageMapper()
        self.mapper.SetColorWindow(255)
        self.mapper.SetColorLevel(127.5)
        actor = vtk.vtkActor2D()
        actor.SetMapper(self.mapper)
        actor.GetProperty().SetDisplayLocationToBackground()
        self.renderer.AddViewProp(actor)
        self.fit()

    def fit(self) -> None:
        self.logic.ResizeSliceNode(*self.size)
        self.logic.FitSliceToBackground()
        self.logic.SnapSliceOffsetToIJK()

    def render(self, path: Path | None = None):
        """The pixels (height, width, 3), and a PNG where asked."""
        from vtk.util import numpy_support

        self.mapper.SetInputConnection(self.logic.GetImageDataConnection())
        self.interactor.Render()
        self.window.Render()
        grab = vtk.vtkWindowToImageFilter()
        grab.SetInput(self.window)
        grab.ReadFrontBufferOff()
        grab.Update()
        if path is not None:
            writer = vtk.vtkPNGWriter()
            writer.SetFileName(str(path))
            writer.SetInputConnection(grab.GetOutputPort())
            writer.Write()
        pixels = numpy_support.vtk_to_numpy(grab.GetOutput().GetPointData().GetScalars())
        return pixels.reshape(self.size[1], self.size[0], -1)[::-1, :, :3].copy()

    def close(self) -> None:
        self.group.SetMRMLDisplayableNode(None)
        self.window.Finalize()
