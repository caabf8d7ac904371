"""The slice views: three that are linked, thick slabs, and which slice was really on the screen."""

from __future__ import annotations

from typing import Callable, List, Optional, Tuple

import slicer

SLABS = (("", 0.0), ("Max", 10.0), ("Mean", 5.0))
"""Thin slices, a maximum that follows vessels, a mean that quiets noise: what the key goes through, in mm."""

LAYOUT_ID = 5163
LAYOUT = """
<layout type="horizontal" split="true">
 <item splitSize="640"><view class="vtkMRMLSliceNode" singletontag="Red">
  <property name="orientation" action="default">Axial</property>
  <property name="viewlabel" action="default">R</property>
  <property name="viewcolor" action="default">#F34A33</property>
 </view></item>
 <item splitSize="360"><layout type="vertical" split="true">
  <item><view class="vtkMRMLSliceNode" singletontag="Green">
   <property name="orientation" action="default">Coronal</property>
   <property name="viewlabel" action="default">G</property>
   <property name="viewcolor" action="default">#6EB04B</property>
  </view></item>
  <item><view class="vtkMRMLSliceNode" singletontag="Yellow">
   <property name="orientation" action="default">Sagittal</property>
   <property name="viewlabel" action="default">Y</property>
   <property name="viewcolor" action="default">#EDD54C</property>
  </view></item>
 </layout></item>
</layout>
"""
"""A large axial view to read and paint in, coronal and sagittal beside it."""

ABOVE_EFFECTS = 10.0
"""Priority of an observer that sees a click before Slicer's own."""


class Views:
    """Red is the axial view in which slices are read; the others follow.

    Args:
        safely: wraps a callback, so that what goes wrong in it is shown.
    """

    def __init__(self, safely: Callable[[Callable], Callable]) -> None:
        self._safely = safely
        self._laid_out = False
        self._observed: List[Tuple] = []
        self._rendered: Optional[float] = None
        self._slab = 0
        self.clicked: Callable[[Tuple[float, float, float]], bool] = lambda ras: False

    def red(self):
        """The slice node of the axial view."""
        return self._widget("Red").mrmlSliceNode()

    def all(self) -> List:
        """The slice nodes of all views that there are."""
        return [self._widget(name).mrmlSliceNode() for name in self._names()]

    def lay_out(self) -> None:
        """The large axial view with coronal and sagittal, once; afterwards the reader's own layout is left alone."""
        if self._laid_out:
            return
        manager = slicer.app.layoutManager()
        layout = manager.layoutLogic().GetLayoutNode()
        if not layout.IsLayoutDescription(LAYOUT_ID):
            layout.AddLayoutDescription(LAYOUT_ID, LAYOUT)
        manager.setLayout(LAYOUT_ID)
        self._laid_out = True

    def fit(self) -> None:
        for name in self._names():
            self._widget(name).sliceLogic().FitSliceToAll()

    def link(self) -> None:
        """Where the other views cut this one is drawn as a line."""
        count = slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSliceDisplayNode")
        for i in range(count):
            slicer.mrmlScene.GetNthNodeByClass(i, "vtkMRMLSliceDisplayNode").SetIntersectingSlicesVisibility(True)

    # --- what was on the screen

    def watch(self) -> None:
        """Notice what is drawn, and clicks."""
        self.unwatch()
        view = self._widget("Red").sliceView()
        for source, event, handler, priority in (
            (view.renderWindow(), "EndEvent", self._drawn, 0.0),
            (view.interactor(), "LeftButtonPressEvent", self._pressed, ABOVE_EFFECTS),
        ):
            self._observed.append((source, source.AddObserver(event, self._safely(handler), priority)))
        view.scheduleRender()

    def unwatch(self) -> None:
        for source, tag in self._observed:
            source.RemoveObserver(tag)
        self._observed = []
        self._rendered = None

    def seen(self) -> bool:
        """Whether the axial view has drawn the slice that it is on."""
        return self._rendered is not None and abs(self._rendered - self.red().GetSliceOffset()) < 1e-3

    def draw(self) -> None:
        """Draw the axial view now; it counts as seen."""
        self._widget("Red").sliceView().forceRender()
        self._drawn()

    def _drawn(self, *_event) -> None:
        self._rendered = self.red().GetSliceOffset()

    # --- pointing

    def pointer(self) -> Optional[Tuple[float, float, float]]:
        """Where the mouse is, in RAS mm; None outside of the views."""
        ras = [0.0, 0.0, 0.0]
        crosshair = slicer.mrmlScene.GetSingletonNode("default", "vtkMRMLCrosshairNode")
        return tuple(ras) if crosshair is not None and crosshair.GetCursorPositionRAS(ras) else None

    def _pressed(self, interactor, _event) -> None:
        x, y = interactor.GetEventPosition()
        ras = self.red().GetXYToRAS().MultiplyPoint((x, y, 0.0, 1.0))[:3]
        self.clicked(ras)

    # --- slabs

    def next_slab(self) -> str:
        """From thin slices to slabs and back, in all views; the name of what is shown now."""
        return self.show_slab((self._slab + 1) % len(SLABS))

    def show_slab(self, number: int) -> str:
        self._slab = number
        kind, thickness_mm = SLABS[number]
        for node in self.all():
            node.SetSlabReconstructionEnabled(bool(kind))
            if kind:
                node.SetSlabReconstructionType(node.GetSlabReconstructionTypeFromString(kind))
                node.SetSlabReconstructionThickness(thickness_mm)
        return kind and f"{kind} {thickness_mm:.0f} mm"

    @property
    def thick(self) -> bool:
        return self._slab != 0

    def _names(self) -> List[str]:
        return [str(name) for name in slicer.app.layoutManager().sliceViewNames()]

    def _widget(self, name: str):
        return slicer.app.layoutManager().sliceWidget(name)
