"""What a reader did on one study, as it is written to disk, sent to the server and read again. No Slicer, no Qt.

``Draft`` is a snapshot of a review; ``Drafts`` is the folder that survives a crash.
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
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from PulmonaryEmbolismLib import images
from PulmonaryEmbolismLib.answers import Sent, Study
from PulmonaryEmbolismLib.client import Client
from PulmonaryEmbolismLib.transport import LabelConflict, Report

EMBOLISM, NONE, UNCERTAIN = "embolism", "none", "uncertain"
"""What a reader sees on a slice. A slice that is not listed is not reviewed, which is never "none"."""

NOT_OUTLINED = "not_outlined"
"""Embolism without an outline, on purpose; in the annotation's JSON a flag of "embolism"."""

DECISIONS = ("accepted", "corrected", "rejected", "undecided")
"""What a reader makes of a candidate: corrected is accepted and repainted, undecided was shown and left open."""

Masks = Dict[int, np.ndarray]


@dataclass(frozen=True)
class Mark:
    """One reviewed slice, as in the annotation's JSON."""

    slice_index: int
    z_mm: float
    state: str
    reader: str = ""
    time: str = ""
    not_outlined: bool = False
    note: str = ""

    @property
    def word(self) -> str:
        """What the reader sees: the state, or ``NOT_OUTLINED``."""
        return NOT_OUTLINED if self.not_outlined else self.state

    def to_json(self) -> dict:
        """As in the annotation's JSON: what was not used is left out."""
        return {key: value for key, value in asdict(self).items() if value or key in ("slice_index", "z_mm", "state")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Mark:
        return cls(
            int(data["slice_index"]),
            float(data["z_mm"]),
            str(data["state"]),
            str(data.get("reader") or ""),
            str(data.get("time") or ""),
            data.get("not_outlined") is True,
            str(data.get("note") or ""),
        )


@dataclass(frozen=True)
class Decision:
    """What a reader decided on one candidate of one model, as in the annotation's JSON."""

    decision: str
    model_sha256: str
    rank: int
    centre_lps_mm: Tuple[float, float, float]
    slice_index: int
    reader: str = ""
    time: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Decision:
        x, y, z = (float(mm) for mm in data["centre_lps_mm"])
        return cls(
            str(data["decision"]),
            str(data["model_sha256"]),
            int(data["rank"]),
            (x, y, z),
            int(data["slice_index"]),
            str(data.get("reader") or ""),
            str(data.get("time") or ""),
        )


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
    label_based_on: Optional[str]
    decisions: Tuple[Decision, ...]
    note: str
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

    def acknowledged(self, sent: Sent) -> Draft:
        """The same work, known to the server."""
        revision = sent.saved.revision if sent.saved else self.based_on
        label_revision = sent.label_revision or self.label_based_on
        return replace(
            self, slices_sent=True, label_sent=True, queued=False, based_on=revision, label_based_on=label_revision
        )

    def after(self, known: Draft) -> Draft:
        """This later work, on top of what the server knows by now."""
        return replace(
            self,
            based_on=known.based_on,
            label_based_on=known.label_based_on,
            label_sent=self.label_sent or self.label == known.label,
        )

    def annotation(self) -> dict:
        """What was reviewed as schema pe-annotation/2, all but the outlines."""
        image = {key: self.image[key] for key in ("sha256", "size", "spacing_mm") if key in self.image}
        annotation = {"schema": "pe-annotation/2", "image": image, "slices": [mark.to_json() for mark in self.marks]}
        if self.decisions:
            annotation["decisions"] = [asdict(decision) for decision in self.decisions]
        if self.note:
            annotation["note"] = self.note
        return annotation

    def to_json(self) -> dict:
        data = {key: getattr(self, key) for key in self.__dataclass_fields__}
        data.update(
            schema="pe-draft/2",
            image=dict(self.image),
            affine=np.asarray(self.affine).tolist(),
            marks=[mark.to_json() for mark in self.marks],
            masks={str(k): _packed(mask) for k, mask in self.masks.items()},
            decisions=[asdict(decision) for decision in self.decisions],
        )
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Draft:
        if data.get("schema") == "pe-draft/1":  # of version 0.1: its decisions name no place
            data = {**data, "decisions": [], "note": "", "label_based_on": None}
        elif data.get("schema") != "pe-draft/2":
            raise ValueError("not a draft of this module")
        values = {key: data[key] for key in cls.__dataclass_fields__}
        shape = tuple(data["shape"])
        values.update(
            shape=shape,
            affine=np.array(data["affine"]),
            marks=tuple(Mark.from_json(mark) for mark in data["marks"]),
            masks={int(k): _unpacked(text, shape[1:]) for k, text in data["masks"].items()},
            decisions=tuple(Decision.from_json(decision) for decision in data["decisions"]),
        )
        return cls(**values)


class Drafts:
    """The folder of drafts: one file per study, replaced as a whole, never deleted by a failure."""

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


def send(client: Client, draft: Draft, folder: Path, report: Report) -> Sent:
    """Bring a draft to its server: the study label, then the slices.

    Raises:
        LabelConflict: if another reader labelled the study otherwise.
        Conflict: if another version of the slices was saved.
    """
    label_revision = None
    if not draft.label_sent:
        try:
            label_revision = client.put_study_label(draft.study, draft.label, draft.label_based_on)
        except LabelConflict as error:
            if error.label != draft.label:
                raise
            label_revision = error.revision  # whoever said it, there is nothing to decide
    if draft.slices_sent:
        return Sent(label_revision)
    report("Writing the annotation")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{draft.stamp}.seg.nrrd"
    annotation = draft.annotation()
    compact = json.dumps(annotation, separators=(",", ":")).replace("|", "/")
    images.write_segmentation(path, draft.masks, draft.shape, draft.affine, compact)
    try:
        return Sent(label_revision, client.put_annotation(draft.study, annotation, path, draft.based_on, report))
    finally:
        path.unlink()


def read_masks(path: Path, annotation: Mapping[str, Any]) -> Masks:
    """The masks of the outlined slices of an annotation, from its .seg.nrrd."""
    image = images.read_image(path).canonical()
    value = int(image.fields.get("Segment0_LabelValue", 1))
    indices = [int(s["slice_index"]) for s in annotation.get("slices") or () if _outlined(s)]
    return {k: image.voxels[k] == value for k in indices if 0 <= k < len(image.voxels)}


def fetch_masks(client: Client, known: Study, folder: Path, report: Report) -> Masks:
    """The paint of the server's version of a study."""
    slices = (known.annotation or {}).get("slices") or ()
    if not known.tag or not any(map(_outlined, slices)):
        return {}
    path = client.download_label(known.row.study, known.tag, folder, report)
    try:
        return read_masks(path, known.annotation)
    finally:
        path.unlink()


def _outlined(entry: Mapping[str, Any]) -> bool:
    """Whether an outline belongs to a slice of an annotation's JSON."""
    return entry.get("state") == EMBOLISM and entry.get("not_outlined") is not True


def _packed(mask: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 1)).decode()


def _unpacked(text: str, shape: Sequence[int]) -> np.ndarray:
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)
