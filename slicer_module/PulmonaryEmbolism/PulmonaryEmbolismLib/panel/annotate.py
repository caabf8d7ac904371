"""Annotate: one slice after the other, by key, button or brush; what is reviewed, as a list and as a strip.

The scene and the session hold the same at every moment that paint rests. Every change goes one of two ways:

* by the brush, which saves Slicer's undo state itself: ``sync_paint`` reads it back;
* by a button or key: ``edit`` saves the undo state, changes the session and writes it to the scene.

What is not paint is kept as a tag of the painted segment, so that Slicer's undo and redo bring back both.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import Callable, Iterator, List, Optional

from slicer.i18n import tr as _

from PulmonaryEmbolismLib import plots
from PulmonaryEmbolismLib.drafts import EMBOLISM, NONE, NOT_OUTLINED, UNCERTAIN
from PulmonaryEmbolismLib.panel import forms
from PulmonaryEmbolismLib.review import ReviewSession

SETTLE_SECONDS = 0.05
"""Paint is read back when it has rested this long."""

STATE_WORDS = {
    EMBOLISM: "embolism",
    NOT_OUTLINED: "embolism, not outlined",
    NONE: "no embolism",
    UNCERTAIN: "uncertain",
    "": "—",
}
WHY_WORDS = {"schedule": "", "suspicious": "suspicious", "extra": "added"}
WIDTHS = (48, 56, 150, 90)


class Annotate:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = ui = panel.ui
        self.strip = plots.SliceStrip()
        self.strip.jump = panel.safely(self.jump)
        self.painted_at: Optional[float] = None
        self._painted_on = -1
        self._k = -1
        self._kept = ""
        self._own = False
        self._selecting = False
        ui.stripFrame.layout().addWidget(self.strip)
        forms.set_up(ui.scheduleTable, WIDTHS, 3)
        panel.on_click(
            [
                (ui.previousButton, functools.partial(self.step, -1)),
                (ui.forwardButton, functools.partial(self.step, 1)),
                (ui.noneButton, functools.partial(self.mark, NONE)),
                (ui.notOutlinedButton, functools.partial(self.mark, NOT_OUTLINED)),
                (ui.unsureButton, functools.partial(self.mark, UNCERTAIN)),
                (ui.undoButton, self.undo),
                (ui.clearButton, self.clear_slice),
                (ui.addButton, self.add_slice),
            ]
        )
        panel.connect(ui.scheduleTable, "currentCellChanged(int,int,int,int)", self._go_to_row)
        panel.connect(ui.sliceNoteEdit, "editingFinished()", self.write_slice_note)

    def begin(self) -> None:
        """A study was opened: where reading begins."""
        with self._own_edit():
            self._keep_text()
        self.show()
        self.jump(self.panel.session.first)
        self.slice_moved()

    def forget(self) -> None:
        """The study was put away."""
        self.painted_at = None
        self._kept = ""
        self.show()

    # --- going from slice to slice

    def jump(self, k: int) -> None:
        if self.panel.nodes is not None:
            self.panel.nodes.jump(self.panel.views.red(), k)

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
        return self.panel.nodes.current_slice(self.panel.views.red())

    def slice_moved(self, *_event) -> None:
        """The view shows another slice; what was painted belongs to the one before."""
        if self.panel.nodes is None:
            return
        k = self.current()
        if k != self._k:
            self.sync_paint()
            self._k = k
        self.strip.show_current(k)
        self.panel.detecting.curve.show_current(k)
        self._show_slice()

    def add_slice(self) -> None:
        """Review a slice that is not on the list."""
        k = self.current()
        self.edit(lambda session: session.add(k))
        self.slice_moved()

    def _go_to_row(self, row: int, _column: int, _from_row: int, _from_column: int) -> None:
        if self.panel.session is not None and not self._selecting and row >= 0:
            self.jump(self.panel.session.lines()[row].slice_index)

    # --- decisions

    def mark(self, word: str) -> None:
        """None, uncertain or not outlined for this slice, then on to the next open one."""
        session = self.panel.session
        if session is None or not self._may_mark():
            return
        self.sync_paint()
        k = self.current()
        question = _("Remove it and mark the slice as {state}?").format(state=STATE_WORDS[word])
        if k in session.masks and not self._may_remove(k, question):
            return
        self.edit(lambda session: session.mark(k, word))
        following = session.next_open(k)
        if following is not None:
            self.jump(following)
        else:
            self.panel.say(_("All slices of the schedule are reviewed. Submit with Ctrl+Enter."))

    def _may_mark(self) -> bool:
        """A mark counts on a slice of the list that was on the screen; otherwise the reader is shown what to do."""
        session, k = self.panel.session, self.current()
        if not session.is_listed(k):
            listed = session.nearest_listed(k)
            text = _("Slice {n} is not on the list, so nothing was marked; add it with Add this slice.")
            if listed is not None:
                self.jump(listed)
                text += " " + _("Shown now: slice {listed} of the list.")
            self.panel.say(text.format(n=k + 1, listed=(listed or 0) + 1))
            return False
        if not self.panel.views.seen():
            self.panel.views.draw()
            self.panel.say(_("Slice {n} was not on the screen yet, so nothing was marked; look at it.").format(n=k + 1))
            return False
        return True

    def undo(self) -> None:
        """Take back the last change, by brush, button or key."""
        self.sync_paint()
        self.ui.editor.undo()
        self.painted()
        self.sync_paint()

    def clear_slice(self) -> None:
        """Take back this slice's mark; with paint on it, ask."""
        self.sync_paint()
        k = self.current()
        if k not in self.panel.session.masks or self._may_remove(k, _("Remove it?")):
            self.edit(lambda session: session.clear(k))

    def write_slice_note(self) -> None:
        """The reader's remark on a reviewed slice."""
        session, text = self.panel.session, self.ui.sliceNoteEdit.text.strip()
        k = self._k
        if session is not None and session.state(k) and text != session.note_of(k):
            self.edit(lambda session: session.write_note(text, k))

    def edit(self, change: Callable[[ReviewSession], object]) -> None:
        """A change by button or key: Slicer's undo takes it back, as it does with paint."""
        self.sync_paint()
        with self._own_edit():
            self.ui.editor.saveStateForUndo()
            change(self.panel.session)
            self.panel.nodes.paint(self.panel.session.masks)
            self._keep_text()
        self.changed()

    def changed(self) -> None:
        """After any decision: kept on disk, shown."""
        self.panel.saving.keep()
        self.show()
        self.panel.detecting.show_candidates()

    def _may_remove(self, k: int, question: str) -> bool:
        """Paint goes only when the reader agrees."""
        text = _("Slice {n} has paint.").format(n=k + 1) + " " + question
        return self.panel.ask(text, ["Remove the paint", "Keep the paint"]) == "Remove the paint"

    # --- between scene and session

    def painted(self, *_event) -> None:
        """Something changed the segment: the brush, undo or redo."""
        if not self._own:
            if self.painted_at is None:
                self._painted_on = self._k
            self.painted_at = time.monotonic()

    def settle(self) -> None:
        """Read paint back once it has rested."""
        if self.painted_at is not None and time.monotonic() - self.painted_at > SETTLE_SECONDS:
            self.sync_paint()

    def sync_paint(self) -> None:
        """Bring into the session what the brush, undo or redo did; afterwards scene and session hold the same."""
        if self.painted_at is None or self.panel.nodes is None:
            return
        self.painted_at = None
        text = self.panel.nodes.review_text()
        if text != self._kept:
            self._went_back(text)
        else:
            self._brushed(self._painted_on)

    def _went_back(self, text: str) -> None:
        """Undo or redo: the scene leads, and is left as it is, or Slicer would forget what to undo and redo next."""
        changed = self.panel.session.from_text(text, self.panel.nodes.masks())
        self._kept = text
        self.changed()
        if changed:
            self.jump(changed[0])
            self.slice_moved()

    def _brushed(self, k: int) -> None:
        """A stroke counts on the slice it was made on, in the clot range if that is asked for; the rest is put back."""
        session, nodes = self.panel.session, self.panel.nodes
        masks = nodes.masks()
        differing = session.differing(masks)
        if not differing:
            return
        elsewhere = [other for other in differing if other != k]
        mask = self.panel.painting.confined(k, masks.get(k), session.masks.get(k))
        added = k in differing and not session.is_listed(k)
        if k in differing:
            if added:
                session.add(k)
            session.set_mask(k, mask)
        with self._own_edit():
            nodes.paint(session.masks)
            self._keep_text()
        self.changed()
        if elsewhere:
            text = _("Only slice {n} was changed; what the brush did to {m} other slices was put back.")
            self.panel.say(text.format(n=k + 1, m=len(elsewhere)))
        elif added:
            self.panel.say(_("Slice {n} was not on the list; it was added, because you painted there.").format(n=k + 1))

    def _keep_text(self) -> None:
        self._kept = self.panel.session.to_text()
        self.panel.nodes.keep_review_text(self._kept)

    @contextlib.contextmanager
    def _own_edit(self) -> Iterator[None]:
        """What happens to the segment meanwhile is the session's own doing."""
        self._own = True
        try:
            yield
        finally:
            self._own = False
            self.painted_at = None

    # --- what is shown

    def show(self) -> None:
        """List, strip and texts after any change."""
        panel, ui, session = self.panel, self.ui, self.panel.session
        lines = session.lines() if session else []
        colours = [plots.STATE_COLOURS[line.state] if line.state else None for line in lines]
        with self._quietly():
            forms.fill(ui.scheduleTable, [_words(line) for line in lines], right=(0, 1), colours=(2, colours))
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
        session, k, ui = self.panel.session, self._k, self.ui
        if session is None:
            ui.sliceLabel.text = ""
            ui.sliceNoteEdit.text = ""
            return
        lines = session.lines()
        index = next((i for i, line in enumerate(lines) if line.slice_index == k), None)
        with self._quietly():
            if index is None:
                state = _("not on the list")
                ui.scheduleTable.clearSelection()
            else:
                state = STATE_WORDS[lines[index].state] if lines[index].state else _("not reviewed")
                ui.scheduleTable.selectRow(index)
        ui.sliceLabel.text = _("Slice {n} of {of}, z {z:.1f} mm: {state}").format(
            n=k + 1, of=session.shape[0], z=session.z_mm(k), state=state
        )
        ui.addButton.enabled = index is None
        ui.sliceNoteEdit.text = session.note_of(k)
        ui.sliceNoteEdit.enabled = bool(session.state(k))
        self.panel.painting.enable()

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        """Rows that are selected meanwhile follow the view, not the reader's keys."""
        before, self._selecting = self._selecting, True
        try:
            yield
        finally:
            self._selecting = before


def _words(line) -> List[str]:
    why = WHY_WORDS.get(line.why, line.why)
    return [str(line.slice_index + 1), f"{line.z_mm:.0f}", STATE_WORDS[line.state], why]
