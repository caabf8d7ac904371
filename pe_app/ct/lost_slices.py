"""Files that were slices and cannot be read: a lost end slice leaves no gap, so their series must not be taken.

A link that leads nowhere, an empty file, one that a copy left short, or the pointer that Git keeps in a file's place is
told by its name: it looks like those of the slices that it lies with.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pe_app.ct.dicom_headers import DICOM_HEAD, looks_dicom

_UNFINISHED = re.compile(r"\.(?:part|partial|filepart|crdownload|download|tmp)$", re.IGNORECASE)
"""What programs append to the name of a file that they are still copying."""
_DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
_POINTERS = (b"version https://git-lfs.github.com/spec/", b"/annex/objects/", b"../.git/annex/objects/")
_NUMBERS = re.compile(r"[0-9A-Fa-f]*\d[0-9A-Fa-f]*")


class NamedFile(NamedTuple):
    """A file that may be a slice.

    Attributes:
        path: where its bytes are.
        folder: the folder that it lies in for whoever exported it.
        name: its name there.
    """

    path: Path
    folder: Hashable
    name: str


class LostSlice(NamedTuple):
    """A file that looks like a slice and cannot be read."""

    file: NamedFile
    reason: str


def lost_slices(
    files: Iterable[NamedFile], slices: Collection[Path], damaged: Mapping[Path, str]
) -> tuple[list[LostSlice], list[NamedFile]]:
    """What looks like a slice and is none.

    Args:
        files: all files.
        slices: those that were read as slices.
        damaged: those that are DICOM and could not be read, and why.

    Returns:
        The lost ones, and those whose name ends like DICOM although they are a text of some kind.
    """
    folders: dict[Hashable, list[NamedFile]] = defaultdict(list)
    for file in files:
        if not file.name.startswith(".") and file.name.upper() != "DICOMDIR":
            folders[file.folder].append(file)
    lost: list[LostSlice] = []
    texts: list[NamedFile] = []
    for members in folders.values():
        names = [file.name for file in members if file.path in slices]
        for file in members:
            if file.path in slices:
                continue
            if file.path in damaged:
                lost.append(LostSlice(file, damaged[file.path]))
            elif _named_like(file.name, names):
                reason = _why_unreadable(file.path)
                if reason and _is_text(file.path) and not _same_pattern(file.name, names):
                    texts.append(file)
                elif reason:
                    lost.append(LostSlice(file, reason))
    return lost, texts


def _named_like(name: str, slices: Sequence[str]) -> bool:
    """Whether a file's name tells that it is one of the slices, or DICOM at least."""
    unfinished = _UNFINISHED.search(name)
    if unfinished:
        whole = name[: unfinished.start()]
        return whole not in slices and _named_like(whole, slices)
    if name.lower().endswith(_DICOM_ENDINGS):
        return True
    numbered = any(c.isdigit() for c in name) or not all(any(c.isdigit() for c in one) for one in slices)
    return numbered and any(_ending(name) == _ending(one) for one in slices)


def _ending(name: str) -> str:
    """``.ima``; empty where there is none, or a number as the last part of a UID."""
    ending = Path(name).suffix.lower()
    return ending if ending[1:].isalpha() else ""


def _same_pattern(name: str, slices: Sequence[str]) -> bool:
    return _NUMBERS.sub("#", name) in {_NUMBERS.sub("#", one) for one in slices}


def _why_unreadable(path: Path) -> str:
    """Why a file is no DICOM; empty where it is."""
    if path.is_symlink() and not path.exists():
        return "it is a link to a file that is not there: fetch what it links to, or mount the share"
    if not path.is_file():
        return ""
    size = path.stat().st_size
    if size == 0:
        return "its 0 bytes are not DICOM, a copy was interrupted: export it again"
    head = _head(path)
    if any(pointer in head for pointer in _POINTERS):
        return "it is a pointer that Git keeps in the file's place: fetch the file (git lfs pull, git annex get)"
    if looks_dicom(head[:DICOM_HEAD]):
        return ""
    return f"its {size} bytes are not DICOM, it was cut off or damaged: export it again"


def _is_text(path: Path) -> bool:
    """Whether it is a note that somebody wrote, and not the rest of a slice or a pointer to one."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    head = _head(path)
    if any(pointer in head for pointer in _POINTERS):
        return False
    text = head.decode("utf-8", "replace")
    return all(c.isprintable() or c in "\r\n\t" for c in text.rstrip("\ufffd"))


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)
