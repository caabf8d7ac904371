"""What the server says, as frozen values. No Slicer, no Qt, no request.

Replies are read with defaults, so that a field that is missing or new breaks nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Tuple


def as_number(value: Any) -> Optional[float]:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def as_text(value: Any) -> str:
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Model:
    """Which weights are served or spoke."""

    name: str = ""
    version: str = ""
    sha256: str = ""
    trained: bool = False
    date: str = ""

    @classmethod
    def from_json(cls, data: Any) -> Model:
        data = data if isinstance(data, dict) else {}
        texts = {key: as_text(data.get(key)) for key in ("name", "version", "sha256", "date")}
        return cls(trained=bool(data.get("trained")), **texts)

    def __str__(self) -> str:
        words = [self.name or "unnamed", self.version, f"({self.date[:10]})" if self.date else ""]
        return " ".join(word for word in words if word) + ("" if self.trained else ", untrained")


@dataclass(frozen=True)
class Server:
    """Who answered at the address."""

    address: str
    version: str
    model: Model
    strategies: Tuple[str, ...]
    blinded: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the worklist."""

    study: str
    state: str = "not_started"
    reviewed: int = 0
    scheduled: int = 0
    label: str = ""
    label_reader: str = ""
    label_revision: Optional[str] = None
    probability: Optional[float] = None
    model: str = ""
    held_by: str = ""
    revision: Optional[str] = None
    usable: bool = True
    reason: str = ""
    reasons: Tuple[str, ...] = ()

    @property
    def not_clinical(self) -> bool:
        """Whether the model has never seen a real embolism: its probability is not a clinical result."""
        return any(code in self.reasons for code in ("untrained_model", "demo_model"))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        return cls(
            study=as_text(data["study"]),
            state=as_text(data.get("state")) or "not_started",
            reviewed=int(data.get("reviewed") or 0),
            scheduled=int(data.get("scheduled") or 0),
            label=as_text(data.get("label")),
            label_reader=as_text(data.get("label_reader")),
            label_revision=data.get("label_revision"),
            probability=as_number(data.get("probability")),
            model=as_text(data.get("model")),
            held_by=as_text(data.get("held_by")),
            revision=data.get("revision"),
            usable=bool(data.get("usable", True)),
            reason=as_text(data.get("reason")),
            reasons=tuple(as_text(code) for code in data.get("reasons") or ()),
        )


@dataclass(frozen=True)
class Scheduled:
    """A slice that the server asks to be reviewed, and why: ``schedule`` or ``suspicious``."""

    slice_index: int
    z_mm: float
    why: str = "schedule"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scheduled:
        return cls(int(data["slice_index"]), float(data["z_mm"]), as_text(data.get("why")) or "schedule")


@dataclass(frozen=True)
class Evidence:
    """One slab's word: where it lies and how probable an embolism is in it."""

    slice_index: int
    z_mm: float
    probability: float


@dataclass(frozen=True)
class Candidate:
    """A region of attention, ranked: where to look."""

    rank: int
    slice_index: int
    z_mm: float
    centre_lps_mm: Tuple[float, float, float]
    extent_mm: Tuple[float, float, float]
    peak: float
    slab_probability: Optional[float]
    side: str = ""
    level: str = ""
    size_mm: Optional[float] = None

    @property
    def place(self) -> str:
        """Side, level and size in words; empty where an older server does not say."""
        size = "" if self.size_mm is None else f"{self.size_mm:.0f} mm"
        return ", ".join(word for word in (self.side, self.level, size) if word)


@dataclass(frozen=True)
class Detection:
    """What the model says of a study (schema pe-detection/1 or 2)."""

    status: str
    reasons: Tuple[str, ...]
    probability: Optional[float]
    threshold: Optional[float]
    evidence: Tuple[Evidence, ...]
    candidates: Tuple[Candidate, ...]
    model: Model

    @property
    def refused(self) -> bool:
        return self.status != "analysed"

    @classmethod
    def from_json(cls, data: Any) -> Detection:
        data = data if isinstance(data, dict) else {}
        evidence = [
            Evidence(int(e["slice_index"]), float(e.get("z_mm") or 0.0), float(e["probability"]))
            for e in data.get("evidence") or ()
            if as_number(e.get("slice_index")) is not None and as_number(e.get("probability")) is not None
        ]
        candidates = [
            Candidate(
                int(c.get("rank") or i + 1),
                int(c["slice_index"]),
                float(c.get("z_mm") or 0.0),
                _triple(c.get("centre_lps_mm")),
                _triple(c.get("extent_mm")),
                float(as_number(c.get("peak")) or 0.0),
                as_number(c.get("slab_probability")),
                as_text(c.get("side")),
                as_text(c.get("level")),
                as_number(c.get("size_mm")),
            )
            for i, c in enumerate(data.get("candidates") or ())
            if as_number(c.get("slice_index")) is not None
        ]
        reasons = tuple(as_text(r.get("message") or r.get("code")) for r in data.get("reasons") or ())
        return cls(
            as_text(data.get("status")) or "refused",
            reasons,
            as_number(data.get("probability")),
            as_number(data.get("threshold")),
            tuple(sorted(evidence, key=lambda e: e.slice_index)),
            tuple(sorted(candidates, key=lambda c: c.rank)),
            Model.from_json(data.get("model")),
        )


def _triple(value: Any) -> Tuple[float, float, float]:
    x, y, z = ([float(n) for n in value or ()] + [0.0, 0.0, 0.0])[:3]
    return x, y, z


@dataclass(frozen=True)
class Study:
    """All that the server knows of one study."""

    row: Row
    image: Mapping[str, Any]
    schedule: Tuple[Scheduled, ...]
    annotation: Optional[dict]
    tag: str
    revision: Optional[str]
    detection: Optional[Detection]

    @property
    def sha256(self) -> str:
        return as_text(self.image.get("sha256"))

    @property
    def size(self) -> Tuple[int, ...]:
        """Slices, rows, columns of the CT; empty if the server does not say."""
        return tuple(int(n) for n in self.image.get("size") or ())


@dataclass(frozen=True)
class Saved:
    """The server's receipt for an annotation."""

    tag: str
    accepted: int
    open_slices: Tuple[int, ...]
    revision: Optional[str]


@dataclass(frozen=True)
class Sent:
    """What of a draft has reached the server: the version of the study label, and the receipt of the slices."""

    label_revision: Optional[str] = None
    saved: Optional[Saved] = None
