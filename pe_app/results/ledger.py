"""What a batch did, on disk: results.jsonl is read by the next run, results.csv by a spreadsheet.

A third file names the studies that were begun and not ended: what a process died of may be among them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from pe_app.common.errors import InputError
from pe_app.common.files import append_durably, write_durably
from pe_app.common.schema import json_text
from pe_app.common.tables import rows_text
from pe_app.model.detection import Candidate, Detection
from pe_app.results.find_studies import BatchStudy
from pe_app.results.outcome import RESULTS, Outcome

TABLE = "results.csv"
BEGUN = ".begun.json"
"""Studies that a run began and did not end: what the process died of may be among them."""
COLUMNS = (
    *("study", "status", "probability", "positive", "message", "problem", "reasons", "place", "slice", "z_mm"),
    *("attention_mm", "candidates", "extent_estimate_ml", "model", "version", "trained", "model_sha256"),
    *("image_sha256", "seconds", "date", "folder", "patient", "accession", "study_date"),
)
"""Of results.csv; place, slice, z_mm and attention_mm are the strongest candidate's."""


class Ledger:
    """results.jsonl and results.csv: a line is added for every outcome, the last one of a study counts."""

    def __init__(self, out: Path) -> None:
        self._lines = out / RESULTS
        self._table = out / TABLE
        self._outcomes: dict[str, Outcome] = {}
        self._superseded = False
        content = self._lines.read_bytes() if self._lines.exists() else b""
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                payload = json.loads(line)
            except ValueError:  # torn by a power cut: its study is done again
                self._superseded = True
                continue
            try:
                outcome = Outcome.from_json(payload)
            except ValueError as error:
                raise InputError(f"{self._lines} line {number}: {error}: choose another --out") from error
            self._superseded |= outcome.study in self._outcomes
            self._outcomes[outcome.study] = outcome
        write_durably(self._table, _csv_lines([COLUMNS, *map(_cells, self._outcomes.values())]))

    def all(self) -> Mapping[str, Outcome]:
        """The outcomes of this run and those before, by study."""
        return self._outcomes

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome; it is on disk when this returns."""
        append_durably(self._lines, json_text(outcome.to_json()).encode() + b"\n")
        append_durably(self._table, _csv_lines([_cells(outcome)]))
        self._superseded |= outcome.study in self._outcomes
        self._outcomes = {**self._outcomes, outcome.study: outcome}  # the reading thread looks at it meanwhile

    def tidy(self) -> None:
        """One line a study in both files."""
        if self._superseded:
            lines = [json_text(outcome.to_json()) + "\n" for outcome in self._outcomes.values()]
            write_durably(self._lines, "".join(lines))
            write_durably(self._table, _csv_lines([COLUMNS, *map(_cells, self._outcomes.values())]))
            self._superseded = False


class Begun:
    """Which studies were begun and not ended, on disk: at which of them an earlier process died, and how often."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._over = False
        self._entries: dict[str, tuple[str, int, bool]] = {}
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                for study, (fingerprint, endings, is_open) in found.items():
                    self._entries[study] = str(fingerprint), int(endings) + bool(is_open), False
            except (ValueError, TypeError, AttributeError):
                path.unlink()  # it is a help, not a result

    def endings(self, study: BatchStudy) -> int:
        """How often the process ended while it was at these files."""
        fingerprint, endings, _ = self._entries.get(study.study, ("", 0, False))
        return endings if fingerprint == study.fingerprint else 0

    def begin(self, study: BatchStudy) -> None:
        """It is being read from now on."""
        self._change(study, (study.fingerprint, self.endings(study), True))

    def end(self, study: BatchStudy) -> None:
        """It was ended well; one that was given up stays known."""
        if self._entries.get(study.study, ("", 0, False))[2]:
            self._change(study, None)

    def forgive(self) -> None:
        """The run ends knowingly: no study is to blame."""
        with self._lock:
            self._over = True
            self._entries = {study: (*entry[:2], False) for study, entry in self._entries.items() if entry[1]}
            if self._entries:
                write_durably(self._path, json.dumps(self._entries))
            else:
                self._path.unlink(missing_ok=True)

    def _change(self, study: BatchStudy, entry: tuple[str, int, bool] | None) -> None:
        with self._lock:
            if self._over:  # the reading thread is one study ahead when a run is stopped
                return
            kept = {name: value for name, value in self._entries.items() if name != study.study}
            self._entries = {**kept, study.study: entry} if entry else kept
            write_durably(self._path, json.dumps(self._entries))


def _cells(outcome: Outcome) -> tuple[object, ...]:
    """A line of results.csv."""
    detection = outcome.detection
    first = detection.candidates[0] if detection and detection.candidates else None
    extent = detection.extent_estimate if detection else None
    model = detection.model if detection else None
    return (
        *(outcome.study, outcome.status, detection.probability if detection else None),
        *(detection.positive if detection else None, outcome.message, outcome.problem),
        " ".join(reason.code for reason in detection.reasons) if detection else None,
        *_place(detection, first),
        len(detection.candidates) if detection and detection.status == "analysed" else None,
        extent.volume_ml if extent else None,
        *((model.name, model.version, model.trained, model.sha256) if model else (None,) * 4),
        detection.image.sha256 if detection else None,
        *(outcome.seconds, outcome.date, outcome.folder, outcome.patient, outcome.accession, outcome.study_date),
    )


def _place(detection: Detection | None, candidate: Candidate | None) -> tuple[object, ...]:
    if detection is None or candidate is None:
        return (None,) * 4
    name = detection.image.slice_name(candidate.slice_index)
    return candidate.place, name, candidate.z_mm, candidate.size_mm


def _csv_lines(rows: Iterable[Iterable[object]]) -> bytes:
    lines = ([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)
    return rows_text(lines).encode()
