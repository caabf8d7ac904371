"""Reports in a CSV become labels in a CSV, and labels find their studies in the study list.

A report is known by its study's id, accession number, StudyInstanceUID, or patient and date: whatever the hospital's
export has of these. The same columns stand in the file of labels.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import NamedTuple, get_args

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.common.tables import read_table, require_columns, table_text
from pe_app.pacs.importing.pseudonyms import Pseudonyms
from pe_app.reports.mentions import Verdict
from pe_app.reports.report_labels import ReportLabel, label_report
from pe_app.studies import Study


class ReportKey(NamedTuple):
    """What tells whose report it is; empty where the file does not say.

    Attributes:
        study: the id in the study list.
        accession: the accession number.
        study_uid: the StudyInstanceUID.
        patient: the patient's id.
        date: of the study, as 2026-01-31.
    """

    study: str = ""
    accession: str = ""
    study_uid: str = ""
    patient: str = ""
    date: str = ""

    def __str__(self) -> str:
        return next((value for value in self[:3] if value), f"{self.patient} of {self.date or 'no date'}")


@dataclass(frozen=True)
class Labelled:
    """One report's label and whose it is.

    Attributes:
        place: file and line, for messages.
        key: whose report it is.
        found: the label.
    """

    place: str
    key: ReportKey
    found: ReportLabel


@dataclass(frozen=True)
class Joined:
    """Labels and the studies that they belong to.

    Attributes:
        labels: by the study's id.
        studies: the study's id by the label's place.
        unmatched: reports that belong to no study of the list.
        ambiguous: reports that may belong to several studies of the list.
        without_report: ids of the studies that no report belongs to.
    """

    labels: Mapping[str, ReportLabel]
    studies: Mapping[str, str]
    unmatched: tuple[Labelled, ...]
    ambiguous: tuple[Labelled, ...]
    without_report: tuple[str, ...]


KEYS = ReportKey._fields
LABEL_COLUMNS = tuple(field.name for field in fields(ReportLabel))
COLUMNS = ("study", *LABEL_COLUMNS)
"""Of a file of labels whose reports are known by their study's id alone."""

_SPELLED = {
    "accession": ("accessionnumber", "accessionno", "accnumber", "accno", "acc"),
    "study_uid": ("studyuid", "studyinstanceuid"),
    "patient": ("patientid", "mrn"),
    "date": ("studydate", "examdate"),
    "study": ("studyid",),
    "report": ("reporttext", "radiologyreport"),
}
"""What hospitals call the columns, without blanks, underscores and hyphens."""
_COLUMN_OF = {spelling: column for column, spellings in _SPELLED.items() for spelling in spellings}


def label_reports(csv_in: str | Path, csv_out: str | Path, progress: ProgressCallback = silent) -> tuple[Labelled, ...]:
    """Label the reports of a CSV with the column ``report`` and one or more of ``KEYS``; write them, all or nothing.

    Raises:
        InputError: naming file and line, if a column is missing, a report is nobody's or two are the same study's.
    """
    table = read_table(Path(csv_in), _column)
    require_columns(table, ("report",), (" or ".join(KEYS), "report"))
    _check_keys(table.columns, table.name)
    keys = [_key(row.values, row.place) for row in table.rows]
    _check_once(keys, [row.place for row in table.rows])
    labelled = []
    for done, (row, key) in enumerate(zip(table.rows, keys, strict=True)):
        if done % 200 == 0:
            progress(Progress("label reports", done, len(keys)))
        labelled.append(Labelled(row.place, key, label_report(row.values["report"])))
    write_labels(labelled, csv_out)
    progress(Progress("label reports", len(keys), len(keys)))
    return tuple(labelled)


def write_labels(labelled: Sequence[Labelled], path: str | Path) -> None:
    """Write labels as ``read_labels`` reads them; of the keys the study and those that some report has."""
    used = [name for k, name in enumerate(KEYS) if name == "study" or any(one.key[k] for one in labelled)]
    rows = [
        [*(getattr(one.key, name) for name in used), *(_CELL.get(value, value) for value in astuple(one.found))]
        for one in labelled
    ]
    write_durably(Path(path), table_text([*used, *LABEL_COLUMNS], rows))


_CELL: dict[object, str] = {True: "yes", False: "no"}


def read_labels(path: str | Path) -> tuple[Labelled, ...]:
    """The labels that ``label_reports`` wrote, perhaps corrected by hand."""
    table = read_table(Path(path), _column)
    require_columns(table, LABEL_COLUMNS, COLUMNS)
    _check_keys(table.columns, table.name)
    labelled = []
    for row in table.rows:
        values = row.values
        if values["label"] not in get_args(Verdict):
            raise InputError(f"{row.place}: unknown label {values['label']!r}; write {', '.join(get_args(Verdict))}")
        found = ReportLabel(
            label=values["label"],  # type: ignore[arg-type]
            sentence=values["sentence"],
            location=values["location"],  # type: ignore[arg-type]
            side=values["side"],  # type: ignore[arg-type]
            acuity=values["acuity"],  # type: ignore[arg-type]
            not_diagnostic=values["not_diagnostic"] == "yes",
            unread=values["unread"],
        )
        labelled.append(Labelled(row.place, _key(values, row.place), found))
    _check_once([one.key for one in labelled], [one.place for one in labelled])
    return tuple(labelled)


def join_labels(
    labelled: Sequence[Labelled], studies: Sequence[Study], pseudonym: Callable[[ReportKey], ReportKey] | None = None
) -> Joined:
    """Find every label's study: by the study's id, its accession number, its UID, or patient and date.

    Args:
        labelled: the labels.
        studies: the study list, as ``pe-app import`` made it where reports are not known by the study's id.
        pseudonym: gives what the list of a de-identified import has in place of a report's true key.

    Raises:
        InputError: if no label has a study, two have the same one, or what a report says of whose it is does not agree.
    """
    index: dict[tuple[str, object], list[Study]] = defaultdict(list)
    for study in studies:
        for name, value in _names(ReportKey(study.study, study.accession, study.study_uid, study.patient, study.date)):
            index[name, value].append(study)
    found: dict[str, Labelled] = {}
    unmatched: list[Labelled] = []
    ambiguous: list[Labelled] = []
    for one in labelled:
        key = pseudonym(one.key) if pseudonym else one.key
        owner, several = _study_of(one, key, index)
        if owner is None:
            (ambiguous if several else unmatched).append(one)
        elif owner.study in found:
            raise InputError(
                f"{one.place}: belongs to the study {owner.study}, as does {found[owner.study].place}: put all that "
                "was reported of a study, addenda too, into one row"
            )
        else:
            found[owner.study] = one
    if labelled and not found:
        raise InputError(_nothing_matched(labelled, studies))
    return Joined(
        {study: one.found for study, one in found.items()},
        {one.place: study for study, one in found.items()},
        tuple(unmatched),
        tuple(ambiguous),
        tuple(study.study for study in studies if study.study not in found),
    )


def pseudonym_of(key: ReportKey, pseudonyms: Pseudonyms) -> ReportKey:
    """What a de-identified study list has in place of a report's accession number, UID, patient and date."""
    return ReportKey(
        key.study,
        pseudonyms.code("accession", key.accession),
        pseudonyms.uid(key.study_uid),
        pseudonyms.code("patient", key.patient),
        pseudonyms.date(key.patient, key.date),
    )


def label_studies(studies: Sequence[Study], labels: Mapping[str, ReportLabel]) -> tuple[Study, ...]:
    """The study list with the labels of the reports filled in.

    A label that is already there stays: a person may have set it. A report that says nothing of embolism leaves the
    label unknown.
    """
    return tuple(
        replace(study, label=labels[study.study].label)
        if not study.label and study.study in labels and labels[study.study].sentence
        else study
        for study in studies
    )


def iso_date(text: str, place: str) -> str:
    """A day in DICOM's, the ISO's or the dotted spelling as 2026-01-31; empty for an empty one.

    Raises:
        InputError: if it is another spelling: 01/02/2026 is January or February.
    """
    match = next((m for pattern in _DATES if (m := pattern.fullmatch(text))), None)
    if not text:
        return ""
    try:
        if match is None:
            raise ValueError
        return date(int(match["year"]), int(match["month"]), int(match["day"])).isoformat()
    except ValueError as error:
        raise InputError(f"{place}: the date {text!r} cannot be read: write it as 2026-01-31") from error


_DATES = tuple(
    re.compile(pattern + r"(?:[T ]\d\d:?\d\d.*)?")
    for pattern in (
        r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)",
        r"(?P<year>\d{4})[-/](?P<month>\d\d?)[-/](?P<day>\d\d?)",
        r"(?P<day>\d\d?)\.(?P<month>\d\d?)\.(?P<year>\d{4})",
    )
)


def _column(heading: str) -> str:
    """A column's own name for what a hospital calls it."""
    plain = re.sub(r"[ _\-.]", "", heading)
    return _COLUMN_OF.get(plain, heading)


def _check_keys(columns: Sequence[str], name: str) -> None:
    if not set(columns) & {"study", "accession", "study_uid"} and not {"patient", "date"} <= set(columns):
        raise InputError(
            f"{name}: no column identifies the study of a report: name one study, accession or study_uid, or two "
            "patient and date"
        )


def _key(values: Mapping[str, str], place: str) -> ReportKey:
    key = ReportKey(*(values.get(name, "") for name in KEYS))
    key = key._replace(date=iso_date(key.date, place))
    if not _names(key):
        raise InputError(
            f"{place}: nothing identifies the study of this report: fill in {', '.join(KEYS[:3])} or patient and date"
        )
    return key


def _check_once(keys: Sequence[ReportKey], places: Sequence[str]) -> None:
    seen: dict[ReportKey, str] = {}
    for key, place in zip(keys, places, strict=True):
        if key in seen:
            raise InputError(
                f"{place}: the report of {key} stands already in {seen[key]}: put all that was reported of a study, "
                "addenda too, into one row"
            )
        seen[key] = place


def _names(key: ReportKey) -> list[tuple[str, object]]:
    """The ways in which a key names one study."""
    names: list[tuple[str, object]] = [(name, getattr(key, name)) for name in KEYS[:3] if getattr(key, name)]
    return [*names, ("patient and date", (key.patient, key.date))] if key.patient and key.date else names


def _study_of(
    one: Labelled, key: ReportKey, index: Mapping[tuple[str, object], Sequence[Study]]
) -> tuple[Study | None, bool]:
    """The study that every way of naming agrees on, and whether there were several where there is none."""
    found = [index[name] for name in _names(key) if name in index]
    if not found:
        return None, False
    common = [study for study in found[0] if all(study in others for others in found[1:])]
    if not common:
        ids = ", ".join(sorted({study.study for studies in found for study in studies}))
        raise InputError(f"{one.place}: {one.key} names several studies ({ids}): correct the row")
    for name in ("patient", "date"):
        told, listed = getattr(key, name), {getattr(study, name) for study in common} - {""}
        if told and listed and told not in listed:
            raise InputError(
                f"{one.place}: {one.key} is the study {common[0].study}, but not its {name}: correct the row, or leave "
                f"out the column {name}"
            )
    return (common[0], False) if len(common) == 1 else (None, True)


def _nothing_matched(labelled: Sequence[Labelled], studies: Sequence[Study]) -> str:
    """Why no label has a study, as far as the values show it."""
    names = Counter(name for one in labelled for name, _ in _names(one.key))
    listed = {
        name
        for study in studies
        for name, _ in _names(ReportKey(study.study, study.accession, study.study_uid, study.patient, study.date))
    }
    ids = {value.lstrip("0") for study in studies for value in (study.study, study.accession) if value}
    example = labelled[0].key
    text = f"none of the {len(labelled)} reports belongs to one of the {len(studies)} studies of the list"
    if {example.study.lstrip("0"), example.accession.lstrip("0")} & (ids - {""}):
        return f"{text}: leading zeros are missing in one of them, as spreadsheets drop them ({example})"
    if not listed & set(names):
        return (
            f"{text}: reports are known by {' and '.join(names)}, and the list has none; import the studies again with "
            "this version, which keeps it"
        )
    study = studies[0]
    first = " ".join(value for value in (study.study, study.accession) if value)
    return f"{text}: the first report is of {example}, the first study is {first}; a de-identified list needs its --key"
