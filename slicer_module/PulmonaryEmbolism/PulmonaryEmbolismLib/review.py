"""One study under review: which slices, what the reader decided, what still has to reach the server. No Slicer, no Qt.

``ReviewSession`` is what the reader does; ``Draft`` is a snapshot of it that can be written, sent and read again;
``Drafts`` is the folder that survives a crash. What counts as complete is decided by the server, never here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from PulmonaryEmbolismLib import images
from PulmonaryEmbolismLib.client import Candidate, Client, Report, Row, Saved, Scheduled, Study

EMBOLISM, NONE, UNCERTAIN = "embolism", "none", "uncertain"
"""What a reader can say of a slice. A slice that is not listed is not reviewed, which is never "none"."""

CLOT_HU = (0, 100)
"""Hounsfield units that paint is confined to when the reader asks for it."""

Masks = Dict[int, np.ndarray]


@dataclass(frozen=True)
class Mark:
    """One reviewed slice, as in the annotation's JSON."""

    slice_index: int
    z_mm: float
    state: str
    reader: str = ""
    time: str = ""


class Line(NamedTuple):
    """One line of the schedule as the reader sees it; ``state`` "" is not reviewed."""

    slice_index: int
    z_mm: float
    why: str
    state: str


def now() -> str:
    """The time in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass(frozen=True, eq=False)
class Draft:
    """Everything that a reader did on one study, at one moment."""

    server: str
    study: str
    image: Mapping[str, Any]
    shape: Tuple[int, int, int]
    affine: np.ndarray
    marks: Tuple[Mark, ...]
    masks: Masks
    label: str
    decisions: Mapping[str, str]
    model: str
    based_on: Optional[str]
    slices_sent: bool
    label_sent: bool
    queued: bool
    reader: str
    time: str
    stamp: int

    @property
    def unsent(self) -> bool:
        return not (self.slices_sent and self.label_sent)

    def acknowledged(self, saved: Optional[Saved]) -> Draft:
        """The same work, known to the server: kept for the reader's decisions on candidates."""
        revision = saved.revision if saved else self.based_on
        return replace(self, slices_sent=True, label_sent=True, queued=False, based_on=revision)

    def annotation(self) -> dict:
        """The reviewed slices as schema pe-annotation/1."""
        image = {key: self.image[key] for key in ("sha256", "size", "spacing_mm") if key in self.image}
        return {"schema": "pe-annotation/1", "image": image, "slices": [asdict(mark) for mark in self.marks]}

    def to_json(self) -> dict:
        data = {key: getattr(self, key) for key in self.__dataclass_fields__}
        data.update(
            schema="pe-draft/1",
            image=dict(self.image),
            affine=np.asarray(self.affine).tolist(),
            marks=[asdict(mark) for mark in self.marks],
            masks={str(k): _packed(mask) for k, mask in self.masks.items()},
            decisions=dict(self.decisions),
        )
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Draft:
        if data.get("schema") != "pe-draft/1":
            raise ValueError("not a draft of this module")
        values = {key: data[key] for key in cls.__dataclass_fields__}
        shape = tuple(data["shape"])
        values.update(
            shape=shape,
            affine=np.array(data["affine"]),
            marks=tuple(Mark(**mark) for mark in data["marks"]),
            masks={int(k): _unpacked(text, shape[1:]) for k, text in data["masks"].items()},
        )
        return cls(**values)


class Drafts:
    """The folder of drafts: one file a study, replaced as a whole, never deleted by a failure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._newest: Dict[Path, int] = {}

    def write(self, draft: Draft) -> None:
        """Write, durably. A draft older than the one written is left out: threads may come in any order."""
        path = self._path(draft.server, draft.study)
        with self._lock:
            if self._newest.get(path, 0) <= draft.stamp:
                self._write(draft, path)
                self._newest[path] = draft.stamp

    def read(self, server: str, study: str) -> Optional[Draft]:
        """The last draft of a study, or None if there is none or it cannot be read (then it is set aside)."""
        return self._read(self._path(server, study))

    def pending(self, server: str) -> List[Draft]:
        """The drafts that were to be sent and that this server has not acknowledged."""
        drafts = [self._read(path) for path in sorted(self.folder.glob("*.json"))]
        return [draft for draft in drafts if draft and draft.server == server and draft.unsent and draft.queued]

    def set_aside(self, draft: Draft) -> Path:
        """Keep the draft under another name, so that it is not offered again and not lost."""
        path = self._path(draft.server, draft.study)
        aside = path.with_suffix(f".{draft.stamp}.aside")
        with self._lock:
            self._write(draft, aside)
            if path.exists():
                path.unlink()
            self._newest[path] = max(draft.stamp, self._newest.get(path, 0))
        return aside

    def _write(self, draft: Draft, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(path.name + ".part")
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(json.dumps(draft.to_json()))
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)

    def _path(self, server: str, study: str) -> Path:
        return self.folder / (hashlib.sha256(f"{server}\n{study}".encode()).hexdigest()[:24] + ".json")

    def _read(self, path: Path) -> Optional[Draft]:
        try:
            return Draft.from_json(json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, zlib.error):
            os.replace(path, path.with_suffix(".unreadable"))
            return None


def send(client: Client, draft: Draft, folder: Path, report: Report) -> Optional[Saved]:
    """Bring a draft to its server: the study label, then the slices. None if no slice had to be sent."""
    if not draft.label_sent:
        client.put_study_label(draft.study, draft.label)
    if draft.slices_sent:
        return None
    report("Writing the annotation")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{draft.stamp}.seg.nrrd"
    annotation = draft.annotation()
    compact = json.dumps(annotation, separators=(",", ":")).replace("|", "/")
    images.write_segmentation(path, draft.masks, draft.shape, draft.affine, compact)
    try:
        return client.put_annotation(draft.study, annotation, path, draft.based_on, report)
    finally:
        path.unlink()


def read_masks(path: Path, annotation: Mapping[str, Any]) -> Masks:
    """The masks of the slices that an annotation calls "embolism", from its .seg.nrrd."""
    image = images.read_image(path).canonical()
    value = int(image.fields.get("Segment0_LabelValue", 1))
    indices = [int(s["slice_index"]) for s in annotation.get("slices") or () if s.get("state") == EMBOLISM]
    return {k: image.voxels[k] == value for k in indices if 0 <= k < len(image.voxels)}


def fetch_masks(client: Client, known: Study, folder: Path, report: Report) -> Masks:
    """The paint of the server's version of a study."""
    slices = (known.annotation or {}).get("slices") or ()
    if not known.tag or not any(s.get("state") == EMBOLISM for s in slices):
        return {}
    path = client.download_label(known.row.study, known.tag, folder, report)
    try:
        return read_masks(path, known.annotation)
    finally:
        path.unlink()


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


# --- proposals: never the reader's work until the reader takes them ---------------------------------------------------


def fill_between(masks: Masks, reviewed: Iterable[int]) -> Masks:
    """Masks for the slices between neighbouring painted ones, by shape: the mean of their signed distances.

    Two painted slices with a slice reviewed otherwise between them are not joined. Source: Raya and Udupa 1990,
    shape-based interpolation.
    """
    between: Masks = {}
    order = sorted({*masks, *reviewed})
    for low, high in zip(order, order[1:]):
        if low not in masks or high not in masks or high - low < 2:
            continue
        either = masks[low] | masks[high]
        rows, columns = np.flatnonzero(either.any(1)), np.flatnonzero(either.any(0))
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        below, above = _signed_distance(masks[low][box]), _signed_distance(masks[high][box])
        for k in range(low + 1, high):
            share = (k - low) / (high - low)
            mask = np.zeros_like(either)
            mask[box] = (1 - share) * below + share * above > 0
            if mask.any():
                between[k] = mask
    return between


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Pixels to the outline of the mask, positive inside; half a pixel at either side of the outline."""
    padded = np.pad(mask, 1)
    inner = padded[1:-1, :-2] & padded[1:-1, 2:] & padded[:-2, 1:-1] & padded[2:, 1:-1]
    outline = np.argwhere(mask & ~inner)
    nearest = np.full(mask.shape, np.inf)
    row, column = np.ogrid[: mask.shape[0], : mask.shape[1]]
    for r, c in outline:
        np.minimum(nearest, (row - r) ** 2 + (column - c) ** 2, out=nearest)
    return np.where(mask, np.sqrt(nearest) + 0.5, 0.5 - np.sqrt(nearest))


def candidate_region(
    candidate: Candidate, attention: images.Image, shape: Sequence[int], affine: np.ndarray, hu: Optional[np.ndarray]
) -> np.ndarray:
    """Where paint may begin on a candidate's slice: attention above half of its maximum in the candidate's box.

    Args:
        candidate: the region that the reader accepted.
        attention: the attention volume on its own coarse grid.
        shape: (slices, rows, columns) of the CT.
        affine: (slice, row, column) of the CT to LPS mm.
        hu: the CT's slice, to keep to the clot range; None to keep everything.

    Returns:
        (rows, columns), true where the region is; the reader corrects it.
    """
    rows, columns = shape[1:]
    index = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
    places = index @ affine[:3, 1:3].T + affine[:3, 0] * candidate.slice_index + affine[:3, 3]
    half = np.maximum(np.array(candidate.extent_mm[:2]) / 2, 5.0)
    inside = (np.abs(places[..., :2] - np.array(candidate.centre_lps_mm[:2])) <= half).all(-1)
    if not inside.any():
        return inside
    to_grid = np.linalg.inv(attention.affine)
    values = np.zeros((rows, columns))
    values[inside] = _trilinear(attention.voxels, places[inside] @ to_grid[:3, :3].T + to_grid[:3, 3])
    region = inside & (values >= max(values.max() / 2, 1e-9))
    if hu is not None:
        region &= (hu >= CLOT_HU[0]) & (hu <= CLOT_HU[1])
    return region


def _trilinear(voxels: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Values at fractional indices ``(n, 3)``; the edge's value beyond the edge."""
    last = np.array(voxels.shape) - 1
    index = np.clip(index, 0, last)
    low = np.minimum(np.floor(index).astype(int), np.maximum(last - 1, 0))
    high = np.minimum(low + 1, last)
    share = index - low
    total = np.zeros(len(index))
    for corner in np.ndindex(2, 2, 2):
        take = np.array(corner, bool)
        place = np.where(take, high, low)
        total += np.where(take, share, 1 - share).prod(1) * voxels[tuple(place.T)]
    return total


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


def _packed(mask: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 1)).decode()


def _unpacked(text: str, shape: Sequence[int]) -> np.ndarray:
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)
