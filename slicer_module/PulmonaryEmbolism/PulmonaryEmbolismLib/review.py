"""One study under review: which slices, and what the reader decided. No Slicer, no Qt.

What counts as complete is decided by the server, never here.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from PulmonaryEmbolismLib import images
from PulmonaryEmbolismLib.answers import Candidate, Row, Scheduled, Sent, Study
from PulmonaryEmbolismLib.drafts import (
    EMBOLISM,
    NONE,
    NOT_OUTLINED,
    UNCERTAIN,
    Decision,
    Draft,
    Mark,
    Masks,
    now,
)


class Line(NamedTuple):
    """One line of the schedule as the reader sees it; ``state`` "" is not reviewed."""

    slice_index: int
    z_mm: float
    why: str
    state: str


class ReviewSession:
    """What one reader decides on one study. Every change counts up ``version``.

    The session and Slicer's scene hold the same: paint as paint, everything else as the text that ``to_text`` writes
    and that the scene keeps with the paint, so that Slicer's own undo takes back both at once.
    """

    def __init__(self, server: str, study: Study, image: images.Image, reader: str) -> None:
        self.server = server
        self.study = study.row.study
        self.image = dict(study.image)
        self.shape = image.voxels.shape
        self.affine = image.affine
        self.reader = reader
        self.label = study.row.label
        self.label_revision = study.row.label_revision
        self.note = ""
        self.revision: Optional[str] = None
        self.version = 0
        self.masks: Masks = {}
        self._decisions: Dict[Tuple[str, int], Decision] = {}
        self._marks: Dict[int, Mark] = {}
        self._z_mm = image.slice_z_mm
        self._schedule = {s.slice_index: s for s in study.schedule if 0 <= s.slice_index < self.shape[0]}
        self._extra: set = set()
        self._texts = 0
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
        """What was decided on slice ``k``: embolism, not_outlined, none, uncertain; "" if nothing."""
        mark = self._marks.get(k)
        return mark.word if mark else ""

    @property
    def emboli(self) -> List[int]:
        """The slices with embolism, outlined or not."""
        return [k for k in sorted(self._marks) if self._marks[k].state == EMBOLISM]

    @property
    def first(self) -> int:
        """Where reading begins: the first open slice, of a complete study the first with embolism or on the list."""
        places = [*self.open_slices[:1], *self.emboli[:1], *sorted(self._schedule)[:1], self.shape[0] // 2]
        return places[0]

    def z_mm(self, k: int) -> float:
        """LPS z of a slice."""
        return self._z_mm[k]

    def is_listed(self, k: int) -> bool:
        """Whether slice ``k`` may be painted: it is on the schedule, was reviewed, or was added by the reader."""
        return k in self._schedule or k in self._marks or k in self._extra

    def add(self, k: int) -> None:
        """Let the reader review a slice off the schedule."""
        self._extra.add(k)
        self.version += 1

    def nearest_listed(self, k: int) -> Optional[int]:
        """The listed slice closest to ``k``."""
        return min((line.slice_index for line in self.lines()), key=lambda other: abs(other - k), default=None)

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

    def mark(self, k: int, word: str) -> None:
        """Mark a slice "none", "uncertain" or "not_outlined"; paint on it is taken away."""
        if word not in (NONE, UNCERTAIN, NOT_OUTLINED):
            raise ValueError(f"a slice is marked none, uncertain or not_outlined; only paint outlines it, got {word!r}")
        outline = word == NOT_OUTLINED
        self.masks.pop(k, None)
        self._set(Mark(k, self._z_mm[k], EMBOLISM if outline else word, self.reader, now(), outline, self._note_of(k)))

    def clear(self, k: int) -> None:
        """Take back what was decided on a slice: it is not reviewed again."""
        if k in self._marks:
            self.masks.pop(k, None)
            del self._marks[k]
            self._changed()

    def set_mask(self, k: int, mask: np.ndarray) -> bool:
        """Paint on a slice makes it "embolism"; paint gone leaves it not reviewed. Whether anything changed."""
        before = self.masks.get(k)
        if not mask.any():
            if before is None:
                return False
            self.clear(k)
            return True
        if before is not None and np.array_equal(before, mask):
            return False
        self.masks[k] = mask != 0
        self._set(Mark(k, self._z_mm[k], EMBOLISM, self.reader, now(), False, self._note_of(k)))
        for place, decision in self._decisions.items():
            if before is not None and decision.decision == "accepted" and decision.slice_index == k:
                self._decisions[place] = replace(decision, decision="corrected", reader=self.reader, time=now())
        return True

    def differing(self, masks: Masks) -> List[int]:
        """The slices on which other paint is than the session knows."""
        same = lambda k: k in masks and k in self.masks and np.array_equal(masks[k], self.masks[k])  # noqa: E731
        return [k for k in sorted({*masks, *self.masks}) if not same(k)]

    def write_note(self, text: str, k: Optional[int] = None) -> None:
        """The reader's remark on a reviewed slice, or on the study."""
        if k is None:
            if text != self.note:
                self.note = text
                self._changed()
        elif text != self._note_of(k) and k in self._marks:
            self._set(replace(self._marks[k], note=text))

    def note_of(self, k: Optional[int] = None) -> str:
        return self.note if k is None else self._note_of(k)

    def set_label(self, label: str) -> None:
        """Positive, negative or uncertain, with or without slices; "" takes the label back."""
        if label != self.label:
            self.label = label
            self._label_sent = False
            self.version += 1

    def decide(self, candidate: Candidate, decision: str, model: str) -> None:
        """Remember what the reader makes of a candidate of the model with this SHA-256."""
        if self.decision(candidate, model) != decision:
            self._decisions[model, candidate.rank] = Decision(
                decision, model, candidate.rank, candidate.centre_lps_mm, candidate.slice_index, self.reader, now()
            )
            self._changed()

    def leave_open(self, candidates: Iterable[Candidate], model: str) -> None:
        """The candidates that were shown and not decided on, when the reader is done."""
        for candidate in candidates:
            if not self.decision(candidate, model):
                self.decide(candidate, "undecided", model)

    def decision(self, candidate: Candidate, model: str) -> str:
        known = self._decisions.get((model, candidate.rank))
        return known.decision if known else ""

    # --- as the scene keeps it

    def to_text(self) -> str:
        """All but the paint, as a text that differs from every one written before."""
        self._texts += 1
        return json.dumps(
            {
                "text": self._texts,
                "marks": [mark.to_json() for _, mark in sorted(self._marks.items())],
                "extra": sorted(self._extra),
                "decisions": [asdict(decision) for decision in self._sorted_decisions()],
                "note": self.note,
            }
        )

    def from_text(self, text: str, masks: Masks) -> List[int]:
        """Go back (or forth) to what the scene held once; the slices that are marked or painted otherwise."""
        data = json.loads(text)
        marks = {mark.slice_index: mark for mark in map(Mark.from_json, data["marks"])}
        painted = self.differing(masks)
        changed = sorted({k for k in {*marks, *self._marks} if marks.get(k) != self._marks.get(k)} | {*painted})
        self._marks = {k: mark for k, mark in marks.items() if mark.word != EMBOLISM or k in masks}
        self.masks = dict(masks)
        self._extra = set(data["extra"])
        self._take_decisions(data["decisions"])
        self.note = data["note"]
        for k in masks:
            if self._marks.get(k) is None or self._marks[k].word != EMBOLISM:  # painted, and saved before it was marked
                self._marks[k] = Mark(k, self._z_mm[k], EMBOLISM, self.reader, now())
        self._changed()
        return changed

    # --- what is kept and sent

    @property
    def unsent(self) -> bool:
        return not (self._slices_sent and self._label_sent)

    def snapshot(self) -> Draft:
        """The review as it is now; later changes do not reach it."""
        return Draft(
            self.server, self.study, self.image, self.shape, self.affine,
            tuple(self._marks[k] for k in sorted(self._marks)), dict(self.masks),
            self.label, self.label_revision, self._sorted_decisions(), self.note, self.revision,
            self._slices_sent, self._label_sent, self.queued, self.reader, now(), time.time_ns(),
        )  # fmt: skip

    def queue(self) -> Draft:
        """A snapshot that is to be sent, and sent again until the server has it."""
        self.queued = True
        return self.snapshot()

    def acknowledge(self, draft: Draft, sent: Sent) -> None:
        """The server has this snapshot. Changes made since then are still to be sent."""
        saved = sent.saved
        self._label_sent = self._label_sent or self.label == draft.label
        self.label_revision = sent.label_revision or self.label_revision
        if saved is not None:
            self.revision = saved.revision
            same_marks = draft.marks == tuple(self._marks[k] for k in sorted(self._marks))
            same_words = draft.decisions == self._sorted_decisions() and draft.note == self.note
            self._slices_sent = same_marks and same_words and not self.differing(draft.masks)
        self.queued = self.unsent

    def adopt(self, annotation: Optional[Mapping[str, Any]], masks: Masks, revision: Optional[str]) -> None:
        """Begin from the server's version; nothing of it has to be sent."""
        self._marks, self.masks = _read_marks(annotation, masks, self.shape[0])
        self._take_decisions((annotation or {}).get("decisions") or ())
        self.note = str((annotation or {}).get("note") or "")
        self.revision, self._slices_sent = revision, True
        self.version += 1

    def meet_label(self, label: str, revision: Optional[str], take: bool) -> None:
        """Another reader's label is on the server: take it over, or keep one's own in sight of it."""
        self.label_revision = revision
        if take:
            self.label = label
        self._label_sent = self.label == label
        self.version += 1

    def follow_label(self, row: Row) -> None:
        """Show the label that the server holds now, unless one's own is still to be sent."""
        if self._label_sent:
            self.label, self.label_revision = row.label, row.label_revision
            self.version += 1

    def restore(self, draft: Draft) -> None:
        """Continue from a draft of this study."""
        self._marks = {mark.slice_index: mark for mark in draft.marks}
        self.masks = dict(draft.masks)
        self._decisions = {(d.model_sha256, d.rank): d for d in draft.decisions}
        self.note = draft.note
        self._slices_sent = self._slices_sent and draft.slices_sent
        if not draft.label_sent:
            self.label, self._label_sent = draft.label, False
            self.label_revision = draft.label_based_on
        self.version += 1

    def merge(self, annotation: Optional[Mapping[str, Any]], masks: Masks, revision: Optional[str]) -> None:
        """Add the slices that only the server's version has; where both have one, the reader's stays."""
        marks, masks = _read_marks(annotation, masks, self.shape[0])
        for k, mark in marks.items():
            if k not in self._marks:
                self._marks[k] = mark
                if k in masks:
                    self.masks[k] = masks[k]
        mine = dict(self._decisions)
        self._take_decisions((annotation or {}).get("decisions") or ())
        self._decisions.update(mine)
        self.note = self.note or str((annotation or {}).get("note") or "")
        self.revision = revision
        self._changed()

    def _set(self, mark: Mark) -> None:
        self._marks[mark.slice_index] = mark
        self._changed()

    def _note_of(self, k: int) -> str:
        return self._marks[k].note if k in self._marks else ""

    def _sorted_decisions(self) -> Tuple[Decision, ...]:
        return tuple(self._decisions[place] for place in sorted(self._decisions))

    def _take_decisions(self, entries: Iterable[Mapping[str, Any]]) -> None:
        decisions = map(Decision.from_json, entries)
        self._decisions = {(decision.model_sha256, decision.rank): decision for decision in decisions}

    def _changed(self) -> None:
        self._slices_sent = False
        self.version += 1


def _read_marks(annotation: Optional[Mapping[str, Any]], masks: Masks, slices: int) -> Tuple[Dict[int, Mark], Masks]:
    """Marks of an annotation's JSON; an outlined slice counts only with its outline."""
    marks = {}
    for mark in map(Mark.from_json, (annotation or {}).get("slices") or ()):
        painted = mark.slice_index in masks and bool(masks[mark.slice_index].any())
        if 0 <= mark.slice_index < slices and (mark.word != EMBOLISM or painted):
            marks[mark.slice_index] = mark
    return marks, {k: mask != 0 for k, mask in masks.items() if k in marks and marks[k].word == EMBOLISM}
