"""Painting: Slicer's Segment Editor for a reader of emboli; clot range, growing, proposals, windows, slabs."""

from __future__ import annotations

import functools
from typing import Callable, Optional, Tuple

import numpy as np
import slicer
from slicer.i18n import tr as _

from PulmonaryEmbolismLib.drafts import Masks
from PulmonaryEmbolismLib.proposals import CLOT_HU, fill_between, grow, in_range

HIDDEN_IN_EDITOR = (
    "segmentationNodeSelectorVisible",
    "sourceVolumeNodeSelectorVisible",
    "switchToSegmentationsButtonVisible",
    "addRemoveSegmentButtonsVisible",
    "maskingSectionVisible",
    "unorderedEffectsVisible",
)
EFFECTS = ("Paint", "Draw", "Erase")
"""Those that change one slice. Islands and Threshold work on the whole volume, and the clot range does their work."""

UNDO_STATES = 40
BRUSH_MM = 6.0
"""A lobar artery is 6 to 10 mm wide; Shift and the wheel change the brush."""


class Painting:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = ui = panel.ui
        editor = ui.editor
        editor.setMRMLScene(slicer.mrmlScene)
        for name in HIDDEN_IN_EDITOR:
            editor.setProperty(name, False)
        editor.setEffectNameOrder(list(EFFECTS))
        editor.setMaximumNumberOfUndoStates(UNDO_STATES)
        ui.lowHuBox.value, ui.highHuBox.value = CLOT_HU
        panel.on_click(
            [
                (ui.peWindowButton, functools.partial(self.set_window, "PE")),
                (ui.lungWindowButton, functools.partial(self.set_window, "Lung")),
                (ui.mediastinumWindowButton, functools.partial(self.set_window, "Mediastinum")),
                (ui.slabButton, self.next_slab),
                (ui.growButton, self._grow_on_click),
                (ui.fillButton, self.propose),
                (ui.takeButton, self.take_proposal),
                (ui.discardButton, self.discard_proposal),
            ]
        )
        panel.views.clicked = self._clicked

    def begin(self) -> None:
        """A study was opened: thin slices, and the brush in the hand."""
        self.ui.clotButton.checked = False
        self.ui.growButton.checked = False
        self.panel.views.show_slab(0)
        self._take_brush()

    def _take_brush(self) -> None:
        """Paint, with a brush of a size in millimetres, on one slice."""
        editor = self.ui.editor
        editor.setActiveEffectByName("Paint")
        effect = editor.activeEffect()
        if effect is not None:
            effect.setCommonParameter("BrushDiameterIsRelative", 0)
            effect.setCommonParameter("BrushAbsoluteDiameter", BRUSH_MM)
            effect.setCommonParameter("BrushSphere", 0)

    # --- looking

    def set_window(self, name: str) -> None:
        if self.panel.nodes is not None:
            self.panel.nodes.set_window(name)

    def next_slab(self) -> None:
        """A slab is for looking: nothing is painted on what several slices show together."""
        if self.panel.nodes is None:
            return
        name = self.panel.views.next_slab()
        if name:
            self.ui.editor.setActiveEffect(None)
            self.panel.say(_("Slab: {name}. Paint on thin slices (M).").format(name=name))
        else:
            self._take_brush()
            self.panel.say(_("Thin slices."))
        self.enable()

    # --- the clot range

    def clot_range(self) -> Tuple[float, float]:
        low, high = self.ui.lowHuBox.value, self.ui.highHuBox.value
        return min(low, high), max(low, high)

    def in_clot_range(self, k: int) -> np.ndarray:
        """(rows, columns) of slice ``k``, true where it is as bright as clot."""
        return in_range(self.panel.nodes.hounsfield(k), *self.clot_range())

    def confined(self, k: int, mask: Optional[np.ndarray], before: Optional[np.ndarray]) -> np.ndarray:
        """A slice's paint without what a stroke added outside of the clot range, if the reader asks for that."""
        if mask is None:
            return np.zeros(self.panel.session.shape[1:], bool)
        if not self.ui.clotButton.checked:
            return mask
        kept = self.in_clot_range(k)
        return mask & (kept if before is None else kept | before)

    def editor_changed(self, *_event) -> None:
        """Slicer's key I switches a mask of its own, which costs a whole CT per stroke: it switches ours instead."""
        node = self.panel.editor_node
        if node.GetSourceVolumeIntensityMask():
            node.SetSourceVolumeIntensityMask(False)
            self.ui.clotButton.checked = not self.ui.clotButton.checked

    # --- growing

    def grow_at_pointer(self) -> None:
        """Paint the connected region in the clot range under the mouse pointer."""
        if self.panel.nodes is None:
            return
        ras = self.panel.views.pointer()
        if ras is None:
            self.panel.say(_("Point with the mouse at a clot in the axial view, then press S."))
        else:
            self.grow_at(ras)

    def grow_at(self, ras: Tuple[float, float, float]) -> None:
        panel, annotate = self.panel, self.panel.annotate
        place_k, row, column = panel.nodes.place(ras)
        k = annotate.current()
        if place_k != k or panel.views.thick:
            panel.say(_("A region grows on the thin slice that the axial view shows; point there."))
            return
        spacing_mm = np.linalg.norm(panel.session.affine[:3, 1:3], axis=0)
        region = grow(self.in_clot_range(k), row, column, spacing_mm)
        if not region.any():
            low, high = self.clot_range()
            panel.say(_("There is nothing between {low} and {high} HU to grow from.").format(low=low, high=high))
            return
        self.add_paint(k, region)

    def add_paint(self, k: int, region: np.ndarray) -> None:
        """Paint that comes by a button or key, added to what is there."""

        def change(session) -> None:
            before = session.masks.get(k)
            session.add(k)
            session.set_mask(k, region if before is None else region | before)

        self.panel.annotate.edit(change)
        self.panel.annotate.slice_moved()

    def _grow_on_click(self) -> None:
        """While the button is down a click grows a region, and the brush rests."""
        if self.ui.growButton.checked:
            self.ui.editor.setActiveEffect(None)
        elif self.panel.nodes is not None:
            self._take_brush()

    def _clicked(self, ras: Tuple[float, float, float]) -> None:
        if self.ui.growButton.checked and self.panel.nodes is not None:
            self.grow_at(ras)

    # --- proposals

    def propose(self) -> None:
        """Outlines between painted slices, in a segmentation of their own."""
        panel = self.panel
        if panel.session is None:
            return
        panel.annotate.sync_paint()
        masks = dict(panel.session.masks)
        reviewed = [line.slice_index for line in panel.session.lines() if line.state]
        work: Callable = lambda job: fill_between(masks, reviewed)  # noqa: E731
        panel.runner.submit("propose", _("Outlining between slices"), work, self._proposed, panel.say)

    def _proposed(self, masks: Masks) -> None:
        self.panel.nodes.show_proposal(masks)
        text = _("A proposal is outlined on {n} slices; look at each and take it or not.").format(n=len(masks))
        self.panel.say(text if masks else _("There are no two neighbouring painted slices to go by."))
        self.panel.enable()

    def take_proposal(self) -> None:
        """Make this slice's proposal the reader's own paint."""
        k, proposal = self.panel.annotate.current(), self.panel.nodes.proposal()
        if k in proposal:
            self.add_paint(k, proposal.pop(k))
            self.panel.nodes.show_proposal(proposal)
            self.enable()

    def discard_proposal(self) -> None:
        self.panel.nodes.show_proposal({})
        self.panel.enable()

    def enable(self) -> None:
        nodes = self.panel.nodes
        proposal = nodes.proposal() if nodes is not None else {}
        self.ui.discardButton.enabled = bool(proposal)
        self.ui.takeButton.enabled = nodes is not None and self.panel.annotate.current() in proposal
        self.ui.slabButton.checked = nodes is not None and self.panel.views.thick
