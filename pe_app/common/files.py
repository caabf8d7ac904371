"""Files that are whole or absent: what a power cut, a full disk or a second reader must never see half-written."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well.

    The file is synced, renamed and its folder synced, so it is durable before the block's end is reached. When the
    block fails, ``path`` is as it was and the temporary file is gone. The suffixes are kept, since writers choose the
    format by them.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes it, with all its files, when the block ends well.

    Raises:
        FileExistsError: if there is something else than an empty folder at ``path``.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        try:
            os.rename(temporary, path)
        except OSError as error:
            raise FileExistsError(f"{path} is there already") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(path.parent)


def write_durably(path: Path, content: bytes | str) -> None:
    """Replace a file's content, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def append_durably(path: Path, line: bytes) -> int:
    """Add one line, which ends with a newline, to a file that only grows; the place where it begins.

    A line that a power cut tore before is closed first, so that it never runs into this one.
    """
    make_folder(path.parent)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        place = file.tell()
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return place


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and those below it, by path; links that lead nowhere are among them.

    Folders that are links are followed, each folder once, so that links in a circle end.
    """
    seen: set[str] = set()
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_warn):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [path for name in names if (path := Path(place, name)).is_file() or not path.exists()]
    return sorted(found)


def _warn(error: OSError) -> None:
    log.warning("%s: the folder cannot be read: %s", error.filename, error.strerror)


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, that a power cut does not take away with all that was written into it."""
    for folder in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
