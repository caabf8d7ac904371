"""What a reader states, without its outlines: of slices, of candidates, and how the study was read.

Plain JSON in and out, schema ``pe-annotation/2`` (docs/annotation_format.md). A slice that is not listed was not
reviewed, which is never "none".
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import MISSING, dataclass, field, fields
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, Strict

from pe_app.common.errors import InputError
from pe_app.common.schema import Schema

State = Literal["embolism", "none", "uncertain"]
"""What a reader saw on a slice. There is no word for "not looked at": such a slice is not listed."""

DecisionKind = Literal["accepted", "rejected", "corrected", "undecided"]
"""What a reader made of a candidate: corrected is accepted and repainted, undecided was shown and left open."""

ReadingKind = Literal["open", "independent", "consensus"]

LONGEST_READER = 64
LONGEST_NOTE = 4000

Whole = Annotated[int, Strict(), Field(ge=0, lt=2**16)]
Number = Annotated[int, Strict(), Field(ge=1, lt=2**16)]
Place = Annotated[float, Strict(), Field(gt=-1e6, lt=1e6, allow_inf_nan=False)]
Length = Annotated[float, Strict(), Field(gt=0, lt=1e6, allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)]
Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
Sha256 = Annotated[str, Strict(), Field(pattern=r"^[0-9a-f]{64}$")]

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|\+00:00)")


@dataclass(frozen=True)
class ReviewedSlice:
    r"""One slice that a reader looked at.

    Attributes:
        slice_index: 0 is nearest the feet.
        z_mm: LPS z of its centre; shows when the index is counted otherwise.
        state: what the reader saw.
        reader: who; at most 64 printable characters without ``|``, ``"`` and ``\``.
        time: when, ISO 8601 in UTC; "" where unknown.
        not_outlined: the reader saw an embolism and did not outline it, on purpose: the slice shows that there is
            embolism and not where. Without it every slice with embolism has an outline.
        note: the reader's remark, at most 4,000 characters.

    Raises:
        InputError: if a value lies outside its range.
    """

    slice_index: Whole
    z_mm: Place
    state: State
    reader: Text = ""
    time: Text = ""
    not_outlined: Flag = False
    note: Text = ""

    def __post_init__(self) -> None:
        where = f"slice {self.slice_index}"
        _check_reader(self.reader, where)
        _check_time(self.time, where)
        _check_note(self.note, where)
        if self.not_outlined and self.state != "embolism":
            raise InputError(f"{where}: not_outlined is for slices with embolism only, this one is {self.state}")
        object.__setattr__(self, "z_mm", float(self.z_mm))

    @property
    def outlined(self) -> bool:
        """Whether an outline belongs to it."""
        return self.state == "embolism" and not self.not_outlined


@dataclass(frozen=True)
class CandidateDecision:
    """What a reader decided on a candidate that was shown.

    An embolism that the reader marked and on which no accepted candidate lies was missed by the model; that follows
    from the slices and is not written down.

    Attributes:
        decision: accepted, rejected, corrected or undecided.
        model_sha256: of the model's file whose candidate it is.
        rank: of the candidate in that model's detection, 1 for the strongest.
        centre_lps_mm: its centre in the patient (left, posterior, superior), so that it is found again with any model.
        slice_index: CT slice of its strongest slab.
        extent_mm: its box along (left-right, front-back, feet-head); None where unknown.
        score: attention times slab probability at its strongest cell, 0 to 1; None where unknown.
        reader, time: who decided, and when; as of a slice.

    Raises:
        InputError: if a value lies outside its range.
    """

    decision: DecisionKind
    model_sha256: Sha256
    rank: Number
    centre_lps_mm: tuple[Place, Place, Place]
    slice_index: Whole
    extent_mm: tuple[Length, Length, Length] | None = None
    score: Share | None = None
    reader: Text = ""
    time: Text = ""

    def __post_init__(self) -> None:
        where = f"decision on candidate {self.rank}"
        _check_reader(self.reader, where)
        _check_time(self.time, where)

    @property
    def lies_on_embolism(self) -> bool:
        """Whether the reader found an embolism there."""
        return self.decision in ("accepted", "corrected")


@dataclass(frozen=True)
class Reading:
    """How a study was read: one read of several, or the consensus of some.

    Attributes:
        kind: ``open`` is one reader after the other on one annotation; an ``independent`` read was made without sight
            of the others; a ``consensus`` was made from independent reads.
        reader: whose read it is; "" of an open one, whose slices name their readers.
        number: which read of the study it is, from 1.
        derived_from: versions of the annotations that a consensus was made from, as the server names them.
        unblinded: when results of the model, known label and other reads were first shown to the reader, ISO 8601 in
            UTC; "" where they were never hidden.

    Raises:
        InputError: if a consensus names fewer than two versions, another read any, or a value is out of range.
    """

    kind: ReadingKind = "open"
    reader: Text = ""
    number: Number = 1
    derived_from: tuple[Text, ...] = ()
    unblinded: Text = ""

    def __post_init__(self) -> None:
        _check_reader(self.reader, "reading")
        _check_time(self.unblinded, "reading")
        for version in self.derived_from:
            if not version or len(version) > 128 or not version.isprintable() or set('|"\\') & set(version):
                raise InputError(f"reading: derived_from must name versions, got {reprlib.repr(version)}")
        if self.kind == "consensus" and len(set(self.derived_from)) < 2:
            raise InputError("reading: a consensus is made from at least two versions, name them in derived_from")
        if self.kind != "consensus" and self.derived_from:
            raise InputError(f"reading: derived_from is for a consensus only, this read is {self.kind}")


@dataclass(frozen=True)
class AnnotatedImage:
    """Whose slices they are: SHA-256 of the CT's voxels, its size and spacing as slices, rows, columns."""

    sha256: Sha256
    size: tuple[Number, Number, Number]
    spacing_mm: tuple[Length, Length, Length]


@dataclass(frozen=True)
class AnnotationRecord:
    """The JSON of an annotation, all but its outlines.

    Attributes:
        image: the CT.
        slices: what was reviewed.
        decisions: on candidates that were shown.
        note: of the study, at most 4,000 characters.
        reading: how it was read.
        mask_sha256: identity of the outlines that were saved with it; None where the file does not tell.
    """

    image: AnnotatedImage
    slices: Annotated[list[ReviewedSlice], Strict()]
    decisions: Annotated[list[CandidateDecision], Strict()] = field(default_factory=list)
    note: Text = ""
    reading: Reading = field(default_factory=Reading)
    mask_sha256: Sha256 | None = None

    def __post_init__(self) -> None:
        _check_note(self.note, "note")

    @classmethod
    def from_json(cls, payload: object) -> AnnotationRecord:
        """From decoded JSON of schema 1 or 2; unknown fields, as a newer minor version may bring, are ignored.

        Raises:
            InputError: naming the first value that is not as it must be.
        """
        return ANNOTATION.read(payload)

    def to_json(self) -> dict[str, object]:
        """As plain JSON; what a reader did not use (notes, decisions, ...) is left out."""
        return {"schema": str(ANNOTATION), **_json_fields(self)}


ANNOTATION = Schema(AnnotationRecord, "pe-annotation", 2, oldest=1)


def _json_fields(noun: object) -> dict[str, object]:
    """The fields of a dataclass; a field of schema 2 that has its default is left out."""
    kept: dict[str, object] = {}
    for entry in fields(noun):  # type: ignore[arg-type]
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        value = getattr(noun, entry.name)
        if value != default or entry.name in ("reader", "time"):
            kept[entry.name] = _json_value(value)
    return kept


def _json_value(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_json_value(entry) for entry in value]
    return _json_fields(value) if hasattr(value, "__dataclass_fields__") else value


def _check_reader(reader: str, where: str) -> None:
    if len(reader) > LONGEST_READER:
        raise InputError(f"{where}: reader must be a name of at most {LONGEST_READER} characters")
    # '|' separates the tags of a .seg.nrrd; its header readers disagree on escaped quotes
    if not reader.isprintable() or set('|"\\') & set(reader):
        raise InputError(f'{where}: reader {reader!a} must be printable and without | " and \\')


def _check_time(text: str, where: str) -> None:
    good = not text or _TIME.fullmatch(text)
    if good and text:
        try:
            datetime.fromisoformat(text)
        except ValueError:  # a 31st of February
            good = None
    if not good:
        raise InputError(f"{where}: time must be ISO 8601 in UTC like 2024-05-31T08:15:00Z, got {reprlib.repr(text)}")


def _check_note(note: str, where: str) -> None:
    if len(note) > LONGEST_NOTE:
        raise InputError(f"{where}: a note has at most {LONGEST_NOTE} characters, this one has {len(note)}")
    if not all(letter.isprintable() or letter in "\n\t" for letter in note):
        raise InputError(f"{where}: the note holds characters that cannot be shown: {note[:40]!a}")
