"""What became of one study of a batch: a line of results.jsonl, and the worklist's order and share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pe_app.common.schema import Schema
from pe_app.model.detection import DETECTION, Detection

RESULTS = "results.jsonl"
"""Of a folder of results: what became of every study, one line per study."""

Status = Literal["analysed", "refused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of one study: a line of results.jsonl and of the worklist.

    Attributes:
        study: its name.
        status: ``refused`` where the method is not made for it, ``failed`` where it could not be read or analysed.
        message: why there is no number, in words; empty where there is one.
        detection: the detection; None where it failed.
        problem: what could not be done with the result, e.g. sending it; empty where all was done.
        folder: where its files are, below the folder of all results; empty where there are none.
        pictured: CT slices of thumbnails.jpg, from left to right.
        fingerprint: of the source: it changes when the files do.
        settings: SHA-256 of model, limits and options; with other ones the study is done again.
        date: when it was done, ISO 8601 UTC.
        seconds: of reading, analysing and writing; reading goes on beside the study before it.
        known: done by an earlier run and not again.
        patient, accession, study_date: Patient ID, accession number and study date (YYYYMMDD) of a DICOM study; empty
            where they are not known and after de-identification.
    """

    study: str
    status: Status
    message: str = ""
    detection: Detection | None = None
    problem: str = ""
    folder: str = ""
    pictured: tuple[int, ...] = ()
    fingerprint: str = ""
    settings: str = ""
    date: str = ""
    seconds: float = 0.0
    known: bool = False
    patient: str = ""
    accession: str = ""
    study_date: str = ""

    @property
    def identity(self) -> str:
        """Patient, accession number and date in words; empty where none is known."""
        return identity_words(self.patient, self.accession, self.study_date)

    @property
    def not_clinical(self) -> str:
        """The kind of model whose numbers are not a clinical result (``Detection.not_clinical``); else empty."""
        return self.detection.not_clinical if self.detection else ""

    @property
    def kind(self) -> str:
        """What the filter calls it: ``above`` or ``below`` the threshold, or ``none`` where it was not analysed."""
        if self.detection is None or self.detection.probability is None:
            return "none"
        return "above" if self.detection.positive else "below"

    def to_json(self) -> dict[str, object]:
        """The line as plain JSON, schema ``pe-result/1``; ``known`` is of a run and left out."""
        return RESULT.write(self)

    @classmethod
    def from_json(cls, payload: object) -> Outcome:
        """The outcome that ``to_json`` wrote.

        Raises:
            InputError: naming the first value that is not as it must be, or a schema that is not known.
        """
        return RESULT.read(payload)


def identity_words(patient: str, accession: str, study_date: str) -> str:
    """``Patient P1, accession A1, 2026-01-02``; what is empty is left out."""
    day = study_date if len(study_date) != 8 else f"{study_date[:4]}-{study_date[4:6]}-{study_date[6:]}"
    parts = (f"Patient {patient}" if patient else "", f"accession {accession}" if accession else "", day)
    return ", ".join(part for part in parts if part)


RESULT = Schema(Outcome, "pe-result", 1, left_out=("known",), nested={"detection": DETECTION})  # type: ignore[dict-item]


@dataclass(frozen=True)
class Share:
    """How many of the studies were analysed.

    Attributes:
        analysed, refused, failed: as they are counted.
        waiting: studies that were given and not looked at yet.
    """

    analysed: int
    refused: int
    failed: int
    waiting: int = 0

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], total: int = 0) -> Share:
        """The share of these outcomes, when ``total`` studies were given."""
        count = Counter(outcome.status for outcome in outcomes)
        return cls(count["analysed"], count["refused"], count["failed"], max(0, total - len(outcomes)))

    def __str__(self) -> str:
        given = self.analysed + self.refused + self.failed + self.waiting
        return f"{self.analysed} of {given} analysed ({_percent(self.analysed, given)})"

    @property
    def details(self) -> str:
        """What became of the others: ``2 refused, 1 failed, 4 waiting``; empty where there are none."""
        others = {"refused": self.refused, "failed": self.failed, "waiting": self.waiting}
        return ", ".join(f"{count} {word}" for word, count in others.items() if count)


def by_probability(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Highest probability first; then those without one, by name."""

    def key(outcome: Outcome) -> tuple[bool, float, str]:
        probability = outcome.detection.probability if outcome.detection else None
        return probability is None, -(probability or 0.0), outcome.study

    return sorted(outcomes, key=key)


def _percent(part: int, whole: int) -> str:
    """Rounded down, so that 100% means all."""
    return f"{100 * part // whole}%" if whole else "0%"
