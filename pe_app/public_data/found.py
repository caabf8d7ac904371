"""What a download holds: its studies with CT, mask, label and what else is known, before anything is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from pe_app.common.errors import InputError
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import SUFFIXES
from pe_app.studies import Label, Split, StudyAttributes


@dataclass(frozen=True)
class Terms:
    """What a public set is, and what its makers ask of whoever uses it.

    Attributes:
        title: of the set.
        citation: what to cite.
        place: where it is had.
        terms: of use, in a few words, as the study list and a model's card carry them.
    """

    title: str
    citation: str
    place: str
    terms: str


@dataclass(frozen=True)
class SliceAnswers:
    """Answers for every image of a series, without outlines.

    Attributes:
        embolism: SOP Instance UIDs of the images on which an embolism was seen.
        images: how many images were answered; on all others there is none.
    """

    embolism: frozenset[str]
    images: int


@dataclass(frozen=True)
class FoundStudy:
    """One study of a download.

    Attributes:
        study: its id in the list, ``fumpe-PAT001``.
        ct: DICOM folder, NIfTI or NRRD file.
        patient: the same for all studies of a patient; "" where patients are unknown.
        mask: file of the dense mask; None where nothing is outlined.
        label: where the set states it; else it follows from the mask.
        answers: of the slices, where the set gives them without outlines.
        split: the set's own; "" where it has none.
        attributes: what else the set knows.
    """

    study: str
    ct: Path
    patient: str = ""
    mask: Path | None = None
    label: Label = ""
    answers: SliceAnswers | None = None
    split: Split = ""
    attributes: StudyAttributes = field(default_factory=StudyAttributes)


@dataclass(frozen=True)
class PublicSet:
    """A public data set: its terms, how its studies are found in a download, and how a mask is laid onto its CT.

    Attributes:
        name: as the command line calls it.
        terms: of use.
        find: the studies of a download; InputError where the layout is another one.
        read_mask: of a study's mask file, 0 where there is no embolism, on the CT's grid.
    """

    name: str
    terms: Terms
    find: Callable[[Path], Sequence[FoundStudy]]
    read_mask: Callable[[Path, Volume], NDArray[np.generic]]


def no_mask(path: Path, volume: Volume) -> NDArray[np.generic]:
    """Of a set that has no masks."""
    raise TypeError(f"{path}: the set of {volume.name} has no masks")


def folder_of(download: Path, *names: str) -> Path:
    """The folder in a download that has one of these names, in the download itself or one level below.

    Raises:
        InputError: if there is none.
    """
    for place in (download, *sorted(entry for entry in download.iterdir() if entry.is_dir())):
        for name in names:
            if (place / name).is_dir():
                return place / name
    raise InputError(
        f"{download}: has no folder {' or '.join(names)}; give the folder that the download was unpacked to"
    )


def volume_files(folder: Path) -> dict[str, Path]:
    """The NIfTI and NRRD files of a folder by name without ending."""
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        ending = next((ending for ending in SUFFIXES if entry.name.lower().endswith(ending)), None)
        if ending and entry.is_file() and not entry.name.startswith("."):
            found[entry.name[: -len(ending)]] = Path(entry.path)
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts names as people count: ``2`` before ``10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def read_array(path: Path) -> NDArray[np.generic]:
    """The numbers of a NIfTI or NRRD file as ``(k, j, i)``, without their place: for files whose headers are wrong.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        array: NDArray[np.generic] = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except RuntimeError as error:
        raise InputError(f"{path.name}: cannot be read: copy it again") from error
    return array
