"""What a disc's DICOMDIR lists and the disc does not hold: a lost end slice leaves no gap to be noticed by."""

from __future__ import annotations

import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable

from pe_app.common.errors import InputError
from pe_app.ct.dicom_files import read_header
from pe_app.pacs.importing.unpacking import SourceFile

NAME = "DICOMDIR"


def is_dicomdir(file: SourceFile) -> bool:
    """By its name, which the standard prescribes."""
    return posixpath.basename(file.name).upper() == NAME


def missing_slices(files: Iterable[SourceFile]) -> tuple[Counter[str], list[tuple[SourceFile, str]]]:
    """By SeriesInstanceUID, how many images the DICOMDIRs among ``files`` list that are not there.

    Returns:
        The counts, and the DICOMDIRs that are damaged, each with a reason: one is a hint, its disc is read without it.
    """
    present: dict[object, set[str]] = defaultdict(set)
    directories = []
    for file in files:
        present[file.root].add(_plain(file.name))
        if is_dicomdir(file):
            directories.append(file)
    missing: Counter[str] = Counter()
    damaged = []
    for directory in directories:
        folder = posixpath.dirname(directory.name)
        try:
            listed = _listed(directory)
        except InputError as error:
            damaged.append((directory, str(error)))
            continue
        for series, name in listed:
            missing[series] += _plain(posixpath.join(folder, name)) not in present[directory.root]
    return missing, damaged


def _listed(directory: SourceFile) -> list[tuple[str, str]]:
    """Series and file name of every image, in the order of the records: a series stands before its images."""
    try:
        listed, series = [], ""
        for record in read_header(directory.path, force=False).DirectoryRecordSequence:
            if record.DirectoryRecordType == "SERIES":
                series = str(record.SeriesInstanceUID)
            elif record.DirectoryRecordType == "IMAGE" and "ReferencedFileID" in record:
                parts = record.ReferencedFileID
                listed.append((series, parts if isinstance(parts, str) else "/".join(parts)))
        return listed
    except Exception as error:  # pydicom raises nearly anything on damaged bytes
        raise InputError(f"{directory.name}: the DICOMDIR is damaged, so what the disc lacks is not known") from error


def _plain(name: str) -> str:
    """Names as a disc's file system compares them: without case, version number and dot at the end."""
    return name.lower().removesuffix(";1").removesuffix(".")
