"""RSNA-STR 2020 (RSPECT): 7,279 training studies, answers for every image and no masks.

``train/STUDY/SERIES/SOP.dcm`` and ``train.csv`` with one row per image. Labels of the test images are not public.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pe_app.common.errors import InputError
from pe_app.public_data.found import FoundStudy, PublicSet, SliceAnswers, Terms, no_mask
from pe_app.studies import Label, StudyAttributes

TERMS = Terms(
    "RSPECT: RSNA-STR Pulmonary Embolism CT dataset, 2020",
    "Colak et al., The RSNA Pulmonary Embolism CT Dataset, Radiology: Artificial Intelligence 3:e200254, 2021, doi "
    "10.1148/ryai.2021200254",
    "Kaggle, RSNA STR Pulmonary Embolism Detection; RSNA MIRA",
    "RSNA, non-commercial use only",
)

IDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
ANSWERS = (
    *("pe_present_on_image", "negative_exam_for_pe", "indeterminate", "central_pe", "leftsided_pe", "rightsided_pe"),
    *("chronic_pe", "acute_and_chronic_pe", "rv_lv_ratio_gte_1", "rv_lv_ratio_lt_1", "qa_motion", "qa_contrast"),
    *("flow_artifact", "true_filling_defect_not_pe"),
)


@dataclass
class _Study:
    """What the rows of a study state."""

    series: str
    row: Mapping[str, bool]
    embolism: list[str] = field(default_factory=list)
    images: int = 0


def find(download: Path) -> Sequence[FoundStudy]:
    """The studies of ``train.csv`` whose images are there.

    Raises:
        InputError: if the table is not there or has other columns, or none of its studies is on disk.
    """
    studies = _read_table(download / "train.csv")
    there = {path.name for path in (download / "train").iterdir()} if (download / "train").is_dir() else set()
    found = [
        FoundStudy(
            f"rspect-{uid}",
            download / "train" / uid / study.series,
            label=label_of(study.row),
            answers=SliceAnswers(frozenset(study.embolism), study.images) if study.embolism else None,
            attributes=attributes_of(study.row),
        )
        for uid, study in studies.items()
        if uid in there
    ]
    if not found:
        raise InputError(
            f"{download / 'train'}: holds none of the {len(studies)} studies of train.csv; unpack them there"
        )
    return found


def label_of(row: Mapping[str, bool]) -> Label:
    """The study's label: negative, uncertain where the readers called it indeterminate, else positive."""
    if row["indeterminate"]:
        return "uncertain"
    return "negative" if row["negative_exam_for_pe"] else "positive"


def attributes_of(row: Mapping[str, bool]) -> StudyAttributes:
    """The set's answers in the words of the study list."""
    positive = label_of(row) == "positive"
    sides = [side for side in ("left", "right") if row[f"{side}sided_pe"]]
    impaired = [what for what in ("motion", "contrast") if row[f"qa_{what}"]]
    mimics = {"flow_artifact": "flow artifact", "true_filling_defect_not_pe": "other filling defect"}
    chronicity = "acute and chronic" if row["acute_and_chronic_pe"] else "chronic" if row["chronic_pe"] else "acute"
    rv_lv = "1 or above" if row["rv_lv_ratio_gte_1"] else "below 1" if row["rv_lv_ratio_lt_1"] else ""
    return StudyAttributes(
        central=("yes" if row["central_pe"] else "no") if positive else "",
        side="both" if len(sides) == 2 else "".join(sides),
        chronicity=chronicity if positive else "",
        rv_lv=rv_lv,
        quality=" and ".join(impaired) or "good",
        mimic=" and ".join(word for name, word in mimics.items() if row[name]),
    )


def _read_table(path: Path) -> dict[str, _Study]:
    studies: dict[str, _Study] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            absent = [name for name in (*IDS, *ANSWERS) if name not in header]
            if absent:
                raise InputError(f"{path}: the column {absent[0]!r} is missing; is it RSPECT's train.csv?")
            place = {name: header.index(name) for name in (*IDS, *ANSWERS)}
            for cells in rows:
                if len(cells) != len(header):
                    raise InputError(f"{path} line {rows.line_num}: is cut off: copy the file again")
                _add(studies, cells, place, f"{path} line {rows.line_num}")
    except FileNotFoundError as error:
        raise InputError(f"{path}: is not there; give the folder that holds train.csv and train") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    return studies


def _add(studies: dict[str, _Study], cells: Sequence[str], place: Mapping[str, int], where: str) -> None:
    study_uid, series_uid, sop_uid = (cells[place[name]] for name in IDS)
    study = studies.get(study_uid)
    if study is None:
        answers = {name: cells[place[name]] for name in ANSWERS}
        unknown = [name for name, value in answers.items() if value not in ("0", "1")]
        if unknown:
            raise InputError(f"{where}: {unknown[0]} must be 0 or 1, got {answers[unknown[0]][:20]!a}")
        study = studies[study_uid] = _Study(series_uid, {name: value == "1" for name, value in answers.items()})
    if study.series != series_uid:
        raise InputError(f"{where}: study {study_uid} has two series, {study.series} and {series_uid}")
    study.images += 1
    if cells[place["pe_present_on_image"]] == "1":
        study.embolism.append(sop_uid)


RSPECT = PublicSet("rspect", TERMS, find, no_mask)
