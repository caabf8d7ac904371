"""Annotate: one slice after the other, by key, button or brush; what is reviewed, as a list and as a strip."""

from __future__ import annotations

import functools
import time
from typing import Callable, Optional

import slicer
from slicer.i18n import tr as _

from PulmonaryEmbolismLib import plots
from PulmonaryEmbolismLib.drafts import NONE, UNCERTAIN, Masks
from PulmonaryEmbolismLib.panel import forms
from PulmonaryEmbolismLib.proposals import CLOT_HU, fill_between

SETTLE_SECONDS = 0.15
"""Paint is read back when it has rested this long."""

STATE_WORDS = {"embolism": "embolism", "none": "no embolism", "uncertain": "uncertain", "": "—"}
WHY_WORDS = {"schedule": "", "suspicious": "suspicious", "extra": "added"}
HIDDEN_IN_EDITOR = (
    "segmentationNodeSelectorVisible",
    "sourceVolumeNodeSelectorVisible",
    "switchToSegmentationsButtonVisible",
    "addRemoveSegmentButtonsVisible",
    "maskingSectionVisible",
    "unorderedEffectsVisible",
)


class Annotate:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = ui = panel.ui
        self.strip = plots.SliceStrip()
        self.strip.jump = self.jump
        self.painted_at: Optional[float] = None
        self._k = -1
        ui.stripFrame.layout().addWidget(self.strip)
        self._set_up_editor()
        forms.set_up(ui.scheduleTable, 3)
        forms.on_click(
            [
                (ui.previousButton, functools.partial(self.step, -1)),
                (ui.forwardButton, functools.partial(self.step, 1)),
                (ui.noneButton, functools.partial(self.mark, NONE)),
                (ui.unsureButton, functools.partial(self.mark, UNCERTAIN)),
                (ui.undoButton, self.undo),
                (ui.clearButton, self.clear_slice),
                (ui.addButton, self.add_slice),
                (ui.peWindowButton, functools.partial(self.set_window, "PE")),
                (ui.lungWindowButton, functools.partial(self.set_window, "Lung")),
                (ui.mediastinumWindowButton, functools.partial(self.set_window, "Mediastinum")),
                (ui.clotButton, self.set_clot_range),
                (ui.fillButton, self.propose),
                (ui.takeButton, self.take_proposal),
                (ui.discardButton, self.discard_proposal),
            ]
        )
        ui.scheduleTable.connect("cellClicked(int,int)", lambda row, column: self._go_to_line(row))

    def _set_up_editor(self) -> None:
        editor = self.ui.editor
        editor.setMRMLScene(slicer.mrmlScene)
        for name in HIDDEN_IN_EDITOR:
            editor.setProperty(name, False)
        editor.setEffectNameOrder(["Paint", "Draw", "Erase", "Threshold", "Islands"])
        editor.setMaximumNumberOfUndoStates(20)

    def begin(self) -> None:
        """A study was opened: its first open slice."""
        panel = self.panel
        self.ui.clotButton.checked = False
        self.set_clot_range()
        self.show()
        first = panel.session.next_open(-1)
        self.jump(panel.session.shape[0] // 2 if first is None else first)
        self.slice_moved()

    def forget(self) -> None:
        """The study was put away."""
        self.painted_at = None
        self.show()

    # --- going from slice to slice

    def jump(self, k: int) -> None:
        if self.panel.nodes is not None:
            self.panel.nodes.jump(self.panel.red_node(), k)

    def step(self, direction: int) -> None:
        if self.panel.session is None:
            return
        self.sync_paint()
        k = self.panel.session.step(self.current(), direction)
        if k is None:
            end = _("last") if direction > 0 else _("first")
            self.panel.say(_("This is the {end} slice of the list.").format(end=end))
        else:
            self.jump(k)

    def current(self) -> int:
        return self.panel.nodes.current_slice(self.panel.red_node())

    def slice_moved(self, *_event) -> None:
        """The view shows another slice: paint may go there if it is on the list."""
        if self.panel.nodes is None:
            return
        k = self.current()
        self._guard(k)
        self.strip.show_current(k)
        self.panel.detecting.curve.show_current(k)
        self._k = k
        self._show_slice()

    def set_window(self, name: str) -> None:
        self.panel.nodes.set_window(name)

    def add_slice(self) -> None:
        """Review a slice that is not on the list."""
        self.panel.session.add(self.current())
        self.show()
        self.slice_moved()

    def _go_to_line(self, row: int) -> None:
        if self.panel.session is not None:
            self.jump(self.panel.session.lines()[row].slice_index)

    # --- decisions

    def mark(self, state: str) -> None:
        """Say "none" or "uncertain" of this slice and go on to the next open one."""
        session = self.panel.session
        if session is None:
            return
        self.sync_paint()
        k = self.current()
        question = _("Remove it and mark the slice as {state}?").format(state=STATE_WORDS[state])
        if k in session.masks and not self._may_remove(k, question):
            return
        session.mark(k, state)
        self.repaint(k)
        following = session.next_open(k)
        if following is not None:
            self.jump(following)
        else:
            self.panel.say(_("All slices of the schedule are reviewed. Submit with Ctrl+Enter."))

    def undo(self) -> None:
        self.sync_paint()
        k = self.panel.session.undo()
        if k is not None:
            self.repaint(k)
            self.jump(k)

    def clear_slice(self) -> None:
        """Take back what was said of this slice; with paint on it, ask."""
        self.sync_paint()
        k = self.current()
        if k not in self.panel.session.masks or self._may_remove(k, _("Remove it?")):
            self.panel.session.clear(k)
            self.repaint(k)

    def changed(self) -> None:
        """After any decision: kept on disk, shown."""
        self.panel.saving.keep()
        self.show()

    def _may_remove(self, k: int, question: str) -> bool:
        """Paint goes only when the reader says so."""
        text = _("Slice {n} has paint.").format(n=k + 1) + " " + question
        return self.panel.ask(text, ["Remove the paint", "Keep the paint"]) == "Remove the paint"

    # --- paint

    def set_clot_range(self) -> None:
        self.panel.nodes.set_clot_range(self.ui.clotButton.checked, *CLOT_HU)

    def painted(self, *_event) -> None:
        self.painted_at = time.monotonic()

    def settle(self) -> None:
        """Read paint back once it has rested."""
        if self.painted_at is not None and time.monotonic() - self.painted_at > SETTLE_SECONDS:
            self.sync_paint()

    def sync_paint(self) -> None:
        """Bring what was painted into the session; a slice with paint is "embolism" by itself."""
        panel = self.panel
        if self.painted_at is None or panel.nodes is None:
            return
        self.painted_at = None
        if panel.session.set_masks(panel.nodes.masks()):
            self.changed()
        self._guard(self.current())

    def repaint(self, k: int) -> None:
        """Bring a decision of the session to the scene."""
        self.panel.nodes.paint_slice(k, self.panel.session.masks.get(k))
        self.painted_at = None
        self.changed()

    def repaint_all(self) -> None:
        """Bring all paint of the session to the scene."""
        self.panel.nodes.paint(self.panel.session.masks)
        self.painted_at = None
        self.changed()

    def _guard(self, k: int) -> None:
        self.panel.nodes.guard(k if self.panel.session.is_listed(k) else None)

    # --- proposals

    def propose(self) -> None:
        """Outlines between painted slices, as a segment of their own."""
        self.sync_paint()
        panel = self.panel
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
        panel = self.panel
        k, proposal = self.current(), panel.nodes.proposal()
        if k in proposal:
            self.sync_paint()
            panel.session.paint(k, proposal.pop(k))
            self.repaint(k)
            panel.nodes.show_proposal(proposal)
            self.slice_moved()

    def discard_proposal(self) -> None:
        self.panel.nodes.show_proposal({})
        self.panel.enable()

    # --- what is shown

    def show(self) -> None:
        """List, strip and texts after any change."""
        panel, ui, session = self.panel, self.ui, self.panel.session
        lines = session.lines() if session else []
        words = [
            [str(line.slice_index + 1), f"{line.z_mm:.0f}", STATE_WORDS[line.state], WHY_WORDS.get(line.why, line.why)]
            for line in lines
        ]
        colours = [plots.STATE_COLOURS[line.state] if line.state else None for line in lines]
        forms.fill(ui.scheduleTable, words, right=(0, 1), colours=(2, colours))
        slices = session.shape[0] if session else 0
        self.strip.show_slices(slices, lines)
        panel.detecting.curve.show_slices(slices, lines)
        self._k = self.current() if panel.nodes else -1
        if session:
            done, total = session.progress
            ui.annotateSection.text = _("Annotate: {done} of {total} slices reviewed").format(done=done, total=total)
        panel.saving.show()
        self._show_slice()
        panel.enable()

    def _show_slice(self) -> None:
        session, k = self.panel.session, self._k
        if session is None:
            self.ui.sliceLabel.text = ""
            return
        lines = session.lines()
        index = next((i for i, line in enumerate(lines) if line.slice_index == k), None)
        if index is None:
            state = _("not on the list")
            self.ui.scheduleTable.clearSelection()
        else:
            state = STATE_WORDS[lines[index].state] if lines[index].state else _("not reviewed")
            self.ui.scheduleTable.selectRow(index)
        self.ui.sliceLabel.text = _("Slice {n} of {of}, z {z:.1f} mm: {state}").format(
            n=k + 1, of=session.shape[0], z=session.z_mm(k), state=state
        )
        self.ui.addButton.enabled = index is None
        self.ui.takeButton.enabled = bool(self.panel.nodes) and k in self.panel.nodes.proposal()

    def enable(self) -> None:
        self.ui.discardButton.enabled = self.panel.nodes is not None and bool(self.panel.nodes.proposal())
