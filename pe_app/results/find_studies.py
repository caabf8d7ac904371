"""What a person gave -> studies: which of these files, folders and study lists is a study each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pe_app.common.errors import InputError
from pe_app.ct.dicom_files import read_header
from pe_app.ct.dicom_headers import is_dicom
from pe_app.ct.volume_io import SUFFIXES
from pe_app.results.outcome import RESULTS
from pe_app.studies import read_studies

MAX_DEPTH = 12
"""Folders in folders: more is a loop of links."""


@dataclass(frozen=True)
class BatchStudy:
    """A study to analyse.

    Attributes:
        study: its name, unique in the folder of results.
        path: what ``read_volume`` takes.
        series: SeriesInstanceUID, where the folder holds several.
        fingerprint: changes when the source does; "" takes names, sizes and times of the files at ``path``.
        error: why it could not be had: then nothing is read, and this is what became of it.
    """

    study: str
    path: Path
    series: str | None = None
    fingerprint: str = ""
    error: InputError | None = None


@dataclass(frozen=True)
class Found:
    """Studies among the paths that a person gave.

    Attributes:
        studies: in the order given, within a folder by name.
        said: what was taken as what, a line each.
        single: whether one study was given as such, and not a list or a folder of several.
    """

    studies: tuple[BatchStudy, ...]
    said: tuple[str, ...]
    single: bool


def find_studies(paths: Sequence[Path]) -> Found:
    """The studies that these files, folders and study lists hold.

    A folder that holds DICOM files is one study, also when its series lie in folders of their own; a folder with
    several DICOM studies (told by Study Instance UID), or with .nrrd, .nii or .nii.gz files, holds many. A folder with
    a studies.csv is that study list. Hidden files and folders of results are passed over. A path without any study
    is kept, so that reading it says what is wrong.

    Raises:
        InputError: if a study list cannot be read.
    """
    studies: list[BatchStudy] = []
    said = []
    for path in paths:
        listed = path / "studies.csv" if path.is_dir() else path
        if listed.suffix.lower() == ".csv" and listed.is_file():
            found = [BatchStudy(study.study, study.path) for study in read_studies(listed)]
            said.append(f"{path}: study list of {len(found)} studies")
        elif not path.is_dir():
            found = [BatchStudy(_stem(path), path)]
        else:
            places = _studies_below(path) or [(path, "")]
            found = [BatchStudy(_name(place, path), place) for place, _ in places]
            if [place for place, _ in places] == [path]:
                said.append(f"{path}: one study")
            else:
                names = [found[0].study, found[-1].study] if len(found) > 1 else [found[0].study]
                said.append(f"{path}: {len(found)} {'studies' if len(found) > 1 else 'file'}, {' to '.join(names)}")
                said += _shared_studies(path, places)
        studies += found
    single = len(paths) == 1 and [study.path for study in studies] == list(paths)
    once = {os.path.realpath(study.path): study for study in reversed(studies)}  # of two spellings the first stays
    kept = [study for study in studies if once[os.path.realpath(study.path)] is study]
    said += [f"{study.path}: is given twice, it is analysed once" for study in studies if study not in kept]
    return Found(_with_unique_names(kept), tuple(said), single)


def _studies_below(folder: Path, depth: int = 0) -> list[tuple[Path, str]]:
    """Folders and files that are a study each, with the Study Instance UID ("" for a file) where it is known."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:  # reading the study says what is wrong
        return []
    names = {entry.name for entry in entries}
    if depth > MAX_DEPTH or {"detection.json", RESULTS} & names:
        return []
    files = [entry for entry in entries if entry.is_file() or not entry.exists()]  # links to nowhere are named later
    volumes = [file for file in files if file.name.lower().endswith(SUFFIXES)]
    plain = (file for file in files if file not in volumes and file.name.upper() != "DICOMDIR")
    dicom = next((file for file in plain if _is_dicom(file)), None)
    if dicom is not None:
        return [(folder, _study_uid(dicom))]
    folders = [entry for entry in entries if entry.is_dir() and entry.resolve() not in folder.resolve().parents]
    below = [place for entry in folders for place in _studies_below(entry, depth + 1)]
    uids = {uid for _, uid in below}
    if not volumes and len(uids) == 1 and "" not in uids:
        return [(folder, uids.pop())]  # series of one study
    return [(file, "") for file in volumes if not file.name.lower().endswith(".seg.nrrd")] + below


def _is_dicom(file: Path) -> bool:
    try:
        return is_dicom(file)
    except OSError:
        return False


def _study_uid(file: Path) -> str:
    """Study Instance UID of a DICOM file; its path where it cannot be told, which no other study has."""
    try:
        header = read_header(file, ["StudyInstanceUID"])
        return str(header.get("StudyInstanceUID") or file)
    except Exception:  # pydicom raises nearly anything on damaged bytes; reading the study says what is wrong
        return str(file)


def _shared_studies(folder: Path, places: Sequence[tuple[Path, str]]) -> list[str]:
    """What to say of series that lie beside those of other studies."""
    count = Counter(uid for _, uid in places if uid)
    said = []
    for uid in (uid for uid in count if count[uid] > 1):
        names = ", ".join(place.relative_to(folder).as_posix() for place, of in places if of == uid)
        said.append(f"{names}: series of one study beside other studies; each is taken alone: pe-app import sorts them")
    return said


def _name(place: Path, root: Path) -> str:
    """A study's name: that of its file or folder, with the folders between it and the one that was given."""
    if place == root:
        return root.resolve().name
    relative = place.relative_to(root)
    return "_".join((*relative.parts[:-1], relative.name if place.is_dir() else _stem(relative)))


def _stem(path: Path) -> str:
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    return path.name[: len(path.name) - len(suffix)] if suffix else path.resolve().name


def _with_unique_names(studies: Sequence[BatchStudy]) -> tuple[BatchStudy, ...]:
    """Studies of one name get the name of the folder above before it, then a number."""
    taken: set[str] = set()
    named = []
    count = Counter(study.study for study in studies)
    for study in studies:
        name = study.study
        if count[name] > 1:
            name = f"{study.path.resolve().parent.name}_{name}"
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique)
        named.append(replace(study, study=unique))
    return tuple(named)
