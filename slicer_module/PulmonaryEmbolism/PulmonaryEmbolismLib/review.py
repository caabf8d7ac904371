"""One study under review: which slices, what the reader decided; and the order of the worklist. No Slicer, no Qt.

What counts as complete is decided by the server, never here.
"""

from __future__ import annotations

import time
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from PulmonaryEmbolismLib import images
from PulmonaryEmbolismLib.answers import Candidate, Row, Saved, Scheduled, Study
from PulmonaryEmbolismLib.drafts import EMBOLISM, NONE, UNCERTAIN, Draft, Mark, Masks, now


class Line(NamedTuple):
    """One line of the schedule as the reader sees it; ``state`` "" is not reviewed."""

    slice_index: int
    z_mm: float
    why: str
    state: str


class ReviewSession:
    """What one reader decides on one study. Every change counts up ``version``."""

    def __init__(self, server: str, study: Study, image: images.Image, reader: str) -> None:
        self.server = server
        self.study = study.row.study
        self.image = dict(study.image)
        self.shape = image.voxels.shape
        self.affine = image.affine
        self.reader = reader
        self.label = study.row.label
        self.decisions: Dict[str, str] = {}
        self.model = ""
        self.revision: Optional[str] = None
        self.version = 0
        self.masks: Masks = {}
        self._marks: Dict[int, Mark] = {}
        self._z_mm = image.slice_z_mm
        self._schedule = {s.slice_index: s for s in study.schedule if 0 <= s.slice_index < self.shape[0]}
        self._extra: set = set()
        self._undo: List[tuple] = []
        self._slices_sent = True
        self._label_sent = True
        self.queued = False

    # --- what is to be read

    def lines(self) -> List[Line]:
        """The schedule and every other reviewed slice, from the feet to the head."""
        lines = []
        for k in sorted({*self._schedule, *self._marks, *self._extra}):
            scheduled = self._schedule.get(k) or Scheduled(k, self._z_mm[k], "extra")
            lines.append(Line(k, scheduled.z_mm, scheduled.why, self.state(k)))
        return lines

    def state(self, k: int) -> str:
        """What was decided on slice ``k``; "" if nothing."""
        mark = self._marks.get(k)
        return mark.state if mark else ""

    def z_mm(self, k: int) -> float:
        """LPS z of a slice."""
        return self._z_mm[k]

    def is_listed(self, k: int) -> bool:
        """Whether slice ``k`` may be painted: it is on the schedule, was reviewed, or was added by the reader."""
        return k in self._schedule or k in self._marks or k in self._extra

    def add(self, k: int) -> None:
        """Let the reader review a slice off the schedule."""
        self._extra.add(k)

    @property
    def open_slices(self) -> List[int]:
        return [k for k in sorted(self._schedule) if k not in self._marks]

    @property
    def progress(self) -> Tuple[int, int]:
        """Scheduled slices reviewed, and scheduled in all."""
        return len(self._schedule) - len(self.open_slices), len(self._schedule)

    def step(self, k: int, direction: int) -> Optional[int]:
        """The next (1) or previous (-1) listed slice from ``k``, None at the end."""
        ahead = [line.slice_index for line in self.lines() if (line.slice_index - k) * direction > 0]
        return min(ahead, key=lambda other: abs(other - k)) if ahead else None

    def next_open(self, k: int) -> Optional[int]:
        """The first open slice above ``k``, else the lowest open one, None if all are reviewed."""
        return next((other for other in self.open_slices if other > k), next(iter(self.open_slices), None))

    # --- what the reader does

    def mark(self, k: int, state: str) -> None:
        """Say "none" or "uncertain" of a slice; paint on it is taken away (``undo`` brings it back)."""
        if state not in (NONE, UNCERTAIN):
            raise ValueError(f"a slice is marked none or uncertain; paint makes it embolism, got {state!r}")
        self._remember(k)
        self.masks.pop(k, None)
        self._marks[k] = Mark(k, self._z_mm[k], state, self.reader, now())
        self._changed()

    def clear(self, k: int) -> None:
        """Take back what was decided on a slice: it is not reviewed again."""
        if k in self._marks:
            self._remember(k)
            self.masks.pop(k, None)
            del self._marks[k]
            self._changed()

    def set_mask(self, k: int, mask: np.ndarray) -> bool:
        """Paint on a slice makes it "embolism"; paint gone leaves it not reviewed. Whether anything changed."""
        before = self.masks.get(k)
        if not mask.any():
            if before is None:
                return False
            del self.masks[k], self._marks[k]
        elif before is not None and np.array_equal(before, mask):
            return False
        else:
            self.masks[k] = mask != 0
            self._marks[k] = Mark(k, self._z_mm[k], EMBOLISM, self.reader, now())
        self._changed()
        return True

    def paint(self, k: int, mask: np.ndarray) -> None:
        """Paint that comes by a button, not by the brush: ``undo`` takes it back."""
        self._remember(k)
        self.set_mask(k, mask)

    def set_masks(self, masks: Masks) -> List[int]:
        """All paint there is, as the scene holds it; the slices that changed."""
        nothing = np.zeros(self.shape[1:], bool)
        return [k for k in sorted({*masks, *self.masks}) if self.set_mask(k, masks.get(k, nothing))]

    def undo(self) -> Optional[int]:
        """Take back the last decision; the slice it was on, None if there is nothing to take back."""
        if not self._undo:
            return None
        k, mark, mask = self._undo.pop()
        for held, value in ((self._marks, mark), (self.masks, mask)):
            held.pop(k, None)
            if value is not None:
                held[k] = value
        self._changed()
        return k

    def set_label(self, label: str) -> None:
        """Say positive, negative or uncertain of the study, with or without slices."""
        if label != self.label:
            self.label = label
            self._label_sent = False
            self.version += 1

    def decide(self, candidate: Candidate, decision: str, model: str) -> None:
        """Remember "accepted" or "rejected" for a candidate of a model."""
        if model != self.model:
            self.model, self.decisions = model, {}
        self.decisions[str(candidate.rank)] = decision
        self.version += 1

    def decision(self, candidate: Candidate, model: str) -> str:
        return self.decisions.get(str(candidate.rank), "") if model == self.model else ""

    # --- what is kept and sent

    @property
    def unsent(self) -> bool:
        return not (self._slices_sent and self._label_sent)

    def snapshot(self) -> Draft:
        """The review as it is now; later changes do not reach it."""
        return Draft(
            self.server, self.study, self.image, self.shape, self.affine,
            tuple(self._marks[k] for k in sorted(self._marks)), dict(self.masks),
            self.label, dict(self.decisions), self.model, self.revision,
            self._slices_sent, self._label_sent, self.queued, self.reader, now(), time.time_ns(),
        )  # fmt: skip

    def queue(self) -> Draft:
        """A snapshot that is to be sent, and sent again until the server has it."""
        self.queued = True
        return self.snapshot()

    def acknowledge(self, draft: Draft, saved: Optional[Saved]) -> None:
        """The server has this snapshot. Changes made since then are still to be sent."""
        self._label_sent = self._label_sent or self.label == draft.label
        if saved is not None:
            self.revision = saved.revision
            same_marks = draft.marks == tuple(self._marks[k] for k in sorted(self._marks))
            same_masks = all(draft.masks[k] is self.masks.get(k) for k in draft.masks)
            self._slices_sent = same_marks and same_masks
        self.queued = self.unsent

    def adopt(self, annotation: Optional[Mapping[str, Any]], masks: Masks, revision: Optional[str]) -> None:
        """Begin from the server's version; nothing of it has to be sent."""
        self._marks, self.masks = _read_marks(annotation, masks, self.shape[0])
        self.revision, self._slices_sent = revision, True
        self._undo.clear()
        self.version += 1

    def restore(self, draft: Draft) -> None:
        """Go on from a draft of this study."""
        self._marks = {mark.slice_index: mark for mark in draft.marks}
        self.masks = dict(draft.masks)
        self.decisions, self.model = dict(draft.decisions), draft.model
        self._slices_sent = self._slices_sent and draft.slices_sent
        if not draft.label_sent:
            self.label, self._label_sent = draft.label, False
        self.version += 1

    def merge(self, annotation: Optional[Mapping[str, Any]], masks: Masks, revision: Optional[str]) -> None:
        """Add the slices that only the server's version has; where both have one, the reader's stays."""
        marks, masks = _read_marks(annotation, masks, self.shape[0])
        for k, mark in marks.items():
            if k not in self._marks:
                self._marks[k] = mark
                if k in masks:
                    self.masks[k] = masks[k]
        self.revision = revision
        self._changed()

    def _remember(self, k: int) -> None:
        self._undo.append((k, self._marks.get(k), self.masks.get(k)))

    def _changed(self) -> None:
        self._slices_sent = False
        self.version += 1


def _read_marks(annotation: Optional[Mapping[str, Any]], masks: Masks, slices: int) -> Tuple[Dict[int, Mark], Masks]:
    """Marks of an annotation's JSON; a slice called "embolism" counts only with its mask."""
    marks = {}
    for entry in (annotation or {}).get("slices") or ():
        mark = Mark(
            int(entry["slice_index"]),
            float(entry["z_mm"]),
            str(entry["state"]),
            str(entry.get("reader") or ""),
            str(entry.get("time") or ""),
        )
        painted = mark.slice_index in masks and bool(masks[mark.slice_index].any())
        if 0 <= mark.slice_index < slices and (mark.state != EMBOLISM or painted):
            marks[mark.slice_index] = mark
    return marks, {k: mask != 0 for k, mask in masks.items() if k in marks and marks[k].state == EMBOLISM}


# --- the worklist -------------------------------------------------------------------------------------------------

_STATE_ORDER = {"in_progress": 0, "not_started": 1, "complete": 2}


def arrange(rows: Iterable[Row], text: str, state: str, column: str, descending: bool) -> List[Row]:
    """The rows that match a filter, sorted by a column; unknown probabilities stay last."""
    words = text.lower().split()

    def matches(row: Row) -> bool:
        haystack = f"{row.study} {row.label} {row.held_by} {row.model}".lower()
        return state in ("", row.state) and all(word in haystack for word in words)

    def key(row: Row) -> tuple:
        if column == "probability":
            value = row.probability if row.probability is not None else None
            return (value is None, 0.0 if value is None else (-value if descending else value), row.study)
        value = {
            "study": row.study.lower(),
            "state": (_STATE_ORDER.get(row.state, 3), row.reviewed / max(row.scheduled, 1)),
            "label": row.label,
        }[column]
        return (value, row.study)

    return sorted(filter(matches, rows), key=key, reverse=descending and column != "probability")
