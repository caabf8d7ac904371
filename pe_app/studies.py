"""The study list: which studies there are, what is known of them, and who trains on what.

A CSV with the columns study, path, patient, label, annotation, split; the first two are required. Where it is known,
further columns hold the data set a study comes from with its terms of use, and attributes of the study (central, side,
...); ``pe-app import`` adds accession, study_uid and date, by which reports find their study, and fitness and reasons.
Paths are relative to the CSV's folder, so that a folder of studies can be moved as a whole.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeVar, get_args

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.tables import Table, TableRow, read_table, require_columns, table_text

Label = Literal["positive", "negative", "uncertain", ""]
"""Of a whole study, mined from its report or read by a person; "" is unknown."""

Split = Literal["train", "validation", "test", ""]
"""What a study is used for; "" is not decided yet."""

Fitness = Literal["fit", "warned", "refused", ""]
"""What the quality gate found when the study was imported; "" where nobody asked it."""

LONGEST_WORD = 200
"""Characters of an attribute, a source and its terms."""


@dataclass(frozen=True)
class StudyAttributes:
    """What is known of a positive or negative study beyond its label; "" where it is not. `evaluate` splits by them.

    Values are words of the list's maker; these are what ``import-dataset`` writes.

    Attributes:
        central: whether an embolism lies in a central artery: ``yes`` or ``no``.
        side: ``left``, ``right`` or ``both``.
        chronicity: ``acute``, ``chronic`` or ``acute and chronic``.
        rv_lv: right to left ventricular diameter: ``below 1`` or ``1 or above``.
        quality: ``good``, or what impairs it: ``motion``, ``contrast``, ``motion and contrast``.
        mimic: what looks like an embolism and is none: ``flow artifact``, ``other filling defect``.
    """

    central: str = ""
    side: str = ""
    chronicity: str = ""
    rv_lv: str = ""
    quality: str = ""
    mimic: str = ""


@dataclass(frozen=True)
class Study:
    """One line of the study list.

    Attributes:
        study: its id, unique in the list; never a patient's name.
        path: the CT, a DICOM folder, NIfTI or NRRD file.
        patient: the same for all studies of a patient; "" where patients are unknown.
        label: what is known of the study as a whole.
        annotation: the .json of its reviewed slices; None for a label-only study.
        split: what it is used for.
        source: the data set it comes from, ``rspect``; "" for a hospital's own.
        terms: that data set's terms of use, ``CC BY 4.0``; a model that learns from the study carries them.
        attributes: what else is known of it.
        accession: its accession number; a pseudonym after de-identification, as are the next two.
        study_uid: its StudyInstanceUID.
        date: its day, as 2026-01-31.
        fitness: what the quality gate found at the import.
        reasons: the gate's codes, separated by blanks.
    """

    study: str
    path: Path
    patient: str = ""
    label: Label = ""
    annotation: Path | None = None
    split: Split = ""
    source: str = ""
    terms: str = ""
    attributes: StudyAttributes = field(default_factory=StudyAttributes)
    accession: str = ""
    study_uid: str = ""
    date: str = ""
    fitness: Fitness = ""
    reasons: str = ""


ATTRIBUTES = tuple(entry.name for entry in fields(StudyAttributes))
ALWAYS = tuple(entry.name for entry in fields(Study))[:6]
"""The columns that every list has that this program writes."""
IMPORTED = ("accession", "study_uid", "date", "fitness", "reasons")
"""The columns that an import fills."""
COLUMNS = (*ALWAYS, "source", "terms", *ATTRIBUTES, *IMPORTED)


def read_studies(path: str | Path) -> tuple[Study, ...]:
    """The studies of a list, in its order.

    Raises:
        InputError: naming the line, if a column or value is missing or unknown, a study or its CT is listed twice,
            or a patient's studies stand in different splits.
    """
    path = Path(path)
    table = read_table(path)
    _check_header(table)
    studies = tuple(_study(row, path.parent) for row in table.rows)
    places = [row.place for row in table.rows]
    _check_unique(studies, places)
    _check_patients(studies, places)
    return studies


def write_studies(studies: Sequence[Study], path: str | Path) -> None:
    """Write a study list that ``read_studies`` reads back; all or nothing.

    Columns that hold nothing in any study are left out, but for the first six.
    """
    path = Path(path)
    rows = [_cells(study, path.parent) for study in studies]
    columns = [column for column in COLUMNS if column in ALWAYS or any(row[column] for row in rows)]
    write_durably(path, table_text(columns, [[row[column] for column in columns] for row in rows]))


def missing(studies: Sequence[Study]) -> tuple[Path, ...]:
    """The CTs and annotations of a list that are not on disk, in its order."""
    named = (path for study in studies for path in (study.path, study.annotation) if path is not None)
    return tuple(path for path in named if not path.exists())


def annotated(studies: Sequence[Study]) -> tuple[Study, ...]:
    """The studies with reviewed slices."""
    return tuple(study for study in studies if study.annotation is not None)


def label_only(studies: Sequence[Study]) -> tuple[Study, ...]:
    """The studies without reviewed slices."""
    return tuple(study for study in studies if study.annotation is None)


def unfit(studies: Sequence[Study]) -> tuple[Study, ...]:
    """The studies that the quality gate refused at their import: nothing should be learned or judged from them."""
    return tuple(study for study in studies if study.fitness == "refused")


def patient_sha256(study: Study) -> str:
    """Identity of a study's patient that a model file may carry; "" where the patient is unknown.

    Whoever knows an id can tell whether it is among those of a model; ids themselves cannot be read from it.
    """
    return hashlib.sha256(f"patient\0{study.patient}".encode()).hexdigest() if study.patient else ""


def split_studies(studies: Sequence[Study], validation_fraction: float = 0.2, seed: int = 0) -> tuple[Study, ...]:
    """Fill the splits that are not decided yet with train or validation.

    All studies of a patient go the same way, where patients are known. Within each group of equal label, annotated
    and label-only apart, patients are ordered by a hash of their id and the first ones become validation until that
    holds its share; a patient added later moves at most one other there, and none whose split is written down. Last,
    the fewest patients move that give both sides a positive and a negative study, where that is possible.

    Args:
        studies: the list; splits that are filled stay, and count towards the share (test does not).
        validation_fraction: above 0 and below 1; 0.2 in section 3.1 of the paper.
        seed: another seed is another order.

    Raises:
        InputError: if a patient's studies already stand in different splits.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
    _check_patients(studies, [f"study {study.study}" for study in studies])

    members: dict[str, list[Study]] = {}
    for study in studies:
        members.setdefault(_group(study), []).append(study)
    ordered = sorted(members, key=lambda group: hashlib.sha256(f"{seed}\0{group}".encode()).digest())
    sides: dict[str, Split] = {}
    strata: dict[frozenset[tuple[Label, bool]], list[str]] = {}
    for group in ordered:
        sides[group] = next((study.split for study in members[group] if study.split), "")
        if sides[group] != "test":
            kind = frozenset((study.label, study.annotation is not None) for study in members[group])
            strata.setdefault(kind, []).append(group)

    undecided = [group for group in ordered if not sides[group]]
    for stratum in strata.values():
        wanted = round(validation_fraction * len(stratum)) - sum(sides[group] == "validation" for group in stratum)
        for place, group in enumerate(group for group in stratum if not sides[group]):
            sides[group] = "validation" if place < wanted else "train"

    classes = {group: frozenset(study.label for study in members[group]) & _CLASSES for group in ordered}
    for group in _moves_for_both_classes(sides, classes, undecided):
        sides[group] = _OTHER_SIDE[sides[group]]
    return tuple(replace(study, split=sides[_group(study)]) for study in studies)


_CLASSES: frozenset[Label] = frozenset(("positive", "negative"))
_OTHER_SIDE: dict[Split, Split] = {"train": "validation", "validation": "train"}


def _group(study: Study) -> str:
    """What may not be torn apart: the patient where known, else the study."""
    return f"patient {study.patient}" if study.patient else f"study {study.study}"


def _moves_for_both_classes(
    sides: Mapping[str, Split], classes: Mapping[str, frozenset[Label]], movable: Sequence[str]
) -> tuple[str, ...]:
    """The fewest groups to move so that train and validation lack as few of the two classes as possible.

    At most two witnesses have to arrive on each side, so four moves and two groups of a kind suffice to look at.
    """
    counts = Counter((sides[group], classes[group]) for group in sides if sides[group] in _OTHER_SIDE)
    alike: dict[object, list[str]] = {}
    for group in movable:
        alike.setdefault((sides[group], classes[group]), []).append(group)
    candidates = [group for groups in alike.values() for group in groups[:2]]

    def lacking(moved: tuple[str, ...]) -> int:
        after = Counter(counts)
        for group in moved:
            after[sides[group], classes[group]] -= 1
            after[_OTHER_SIDE[sides[group]], classes[group]] += 1
        return 4 - len({(side, label) for (side, labels), count in after.items() if count for label in labels})

    best: tuple[str, ...] = ()
    for moves in range(5):
        for moved in combinations(candidates, moves):
            if lacking(best) == 0:
                return best
            if lacking(moved) < lacking(best):
                best = moved
    return best


def _check_header(table: Table) -> None:
    unknown = [column for column in table.columns if column and column not in COLUMNS]
    if unknown:
        raise InputError(f"{table.name}: unknown column {unknown[0]!r}; the columns are {', '.join(COLUMNS)}")
    require_columns(table, COLUMNS[:2], COLUMNS)


def _study(row: TableRow, folder: Path) -> Study:
    values, place = row.values, row.place
    for column in COLUMNS[:2]:
        if not values[column]:
            raise InputError(f"{place}: the {column} is empty")
    return Study(
        study=values["study"],
        path=folder / values["path"],
        patient=values.get("patient", ""),
        label=_one_of(values.get("label", "").lower(), get_args(Label), "label", place),
        annotation=folder / values["annotation"] if values.get("annotation") else None,
        split=_one_of(values.get("split", "").lower(), get_args(Split), "split", place),
        source=_word(values.get("source", ""), "source", place),
        terms=_word(values.get("terms", ""), "terms", place),
        attributes=StudyAttributes(**{name: _word(values.get(name, ""), name, place) for name in ATTRIBUTES}),
        accession=values.get("accession", ""),
        study_uid=values.get("study_uid", ""),
        date=values.get("date", ""),
        fitness=_one_of(values.get("fitness", "").lower(), get_args(Fitness), "fitness", place),
        reasons=values.get("reasons", ""),
    )


def _cells(study: Study, folder: Path) -> dict[str, str]:
    """The values of a row by column."""
    return {
        "study": study.study,
        "path": _relative(study.path, folder),
        "patient": study.patient,
        "label": study.label,
        "annotation": _relative(study.annotation, folder) if study.annotation else "",
        "split": study.split,
        "source": study.source,
        "terms": study.terms,
        **{name: getattr(study.attributes, name) for name in ATTRIBUTES},
        **{name: getattr(study, name) for name in IMPORTED},
    }


def _word(value: str, column: str, place: str) -> str:
    if len(value) > LONGEST_WORD or not value.isprintable():
        raise InputError(
            f"{place}: the {column} must be at most {LONGEST_WORD} printable characters, got {value[:20]!a}"
        )
    return value


Word = TypeVar("Word", bound=str)


def _one_of(value: str, words: Sequence[Word], column: str, place: str) -> Word:
    for word in words:
        if value == word:
            return word
    raise InputError(
        f"{place}: unknown {column} {value!r}; write {', '.join(word for word in words if word)} or nothing"
    )


def _check_unique(studies: Sequence[Study], places: Sequence[str]) -> None:
    """One CT under two names would stand in train and validation unnoticed."""
    seen: dict[object, str] = {}
    for study, place in zip(studies, places, strict=True):
        ct = os.path.realpath(study.path)  # one CT under two spellings of its path, or by a link, is one CT
        for value, words in ((study.study, f"the study {study.study}"), (Path(ct), f"the CT {study.path.name}")):
            if value in seen:
                raise InputError(f"{place}: {words} stands already in {seen[value]}: list every study once")
            seen[value] = place


def _check_patients(studies: Sequence[Study], places: Sequence[str]) -> None:
    first: dict[str, tuple[Split, str]] = {}
    for study, place in zip(studies, places, strict=True):
        if study.patient and study.split:
            split, where = first.setdefault(study.patient, (study.split, place))
            if split != study.split:
                raise InputError(
                    f"{place}: patient {study.patient} is in {study.split} here but in {split} in {where}; "
                    "all studies of a patient must share one split"
                )


def _relative(path: Path, folder: Path) -> str:
    """As written in the list: with forward slashes, so that another system reads it too."""
    return Path(os.path.relpath(path, folder)).as_posix()
