"""Where the files are: folders as they lie, archives unpacked under names of our own."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pe_app.common.errors import InputError
from pe_app.common.files import files_below
from pe_app.ct.dicom_headers import DICOM_HEAD, last_line, looks_dicom

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_EXPANSION = 100
"""CT shrinks by 2 to 4, an empty one by 50; an archive that grows more than this was made to fill a disk."""
FREE_BYTES = 1 << 28
"""What any archive may hold, however well it is packed."""
STUB_BYTES = 512
"""A member so small may be what is left of a slice: it is unpacked to be named."""
MAX_MEMBERS = 1_000_000
_CHUNK = 1 << 20
_Member = tuple[str, int, IO[bytes]]


@dataclass(frozen=True)
class SourceFile:
    """One file to look at.

    Attributes:
        path: where its bytes are.
        root: the folder or archive that the user named, or that lay in such a folder.
        name: its path within, with forward slashes.
    """

    path: Path
    root: Path
    name: str


def find_files(source: Path) -> Iterator[SourceFile]:
    """The files of a folder, links followed, or the one file (of a DICOMDIR: all next to it), archives as they are.

    Raises:
        InputError: if there is nothing of that name.
    """
    if source.name.upper() == "DICOMDIR" and source.is_file():
        source = source.parent
    if source.is_file():
        yield SourceFile(source, source.parent, source.name)
    elif source.is_dir():
        for path in files_below(source):
            yield SourceFile(path, source, path.relative_to(source).as_posix())
    else:
        raise InputError(f"{source}: there is no such file or folder")


def is_archive(path: Path) -> bool:
    """By its ending."""
    return path.name.lower().endswith(ARCHIVES)


def unpack(archive: Path, folder: Path) -> list[SourceFile]:
    """What is DICOM in an archive, as numbered files in ``folder``: no member's name ever becomes a path.

    Archives within the archive, links and devices are left out.

    Raises:
        InputError: if it is damaged or asks for a password, or if it grows beyond any CT; nothing of it is kept then.
    """
    folder.mkdir(parents=True)
    allowed = max(FREE_BYTES, MAX_EXPANSION * archive.stat().st_size)
    found: list[SourceFile] = []
    try:
        with _members(archive) as members:
            for number, (name, size, stream) in enumerate(members):
                allowed -= size
                if allowed < 0 or number >= MAX_MEMBERS:
                    raise ValueError("it grows far beyond its size when it is unpacked, as no CT does")
                target = folder / f"{number:07d}.dcm"
                if _copy_dicom(stream, target, name, size):
                    found.append(SourceFile(target, archive, name))
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error) as error:
        shutil.rmtree(folder)
        raise InputError(f"{archive.name}: cannot be unpacked ({last_line(error)})") from error
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        shutil.rmtree(folder)
        raise InputError(f"{archive.name}: the archive is damaged ({last_line(error)}): copy it again") from error
    return found


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[_Member]]:
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as packed:
            yield _zip_members(packed)
    else:
        with tarfile.open(archive) as packed_tar:
            yield _tar_members(packed_tar)


def _zip_members(packed: zipfile.ZipFile) -> Iterator[_Member]:
    for member in packed.infolist():
        if not member.is_dir():
            with packed.open(member) as stream:  # RuntimeError where it asks for a password
                yield member.filename, member.file_size, stream


def _tar_members(packed: tarfile.TarFile) -> Iterator[_Member]:
    for member in packed:  # sizes count of what is passed over, too: it is unpacked to get past it
        stream = packed.extractfile(member) if member.isreg() else None
        if stream is not None:
            yield member.name, member.size, stream


def _copy_dicom(stream: IO[bytes], target: Path, name: str, size: int) -> bool:
    """Whether the member is DICOM and was copied, and no more of it than it says."""
    head = stream.read(DICOM_HEAD)
    if not looks_dicom(head) and not name.lower().endswith(".dcm") and size > STUB_BYTES:
        return False
    with target.open("wb") as file:
        file.write(head)
        left = size - len(head)
        while left > 0 and (chunk := stream.read(min(_CHUNK, left))):
            file.write(chunk)
            left -= len(chunk)
    return True
