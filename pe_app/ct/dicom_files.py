"""DICOM files are opened here and nowhere else: what a file unpacks to is bounded before anything in it is believed.

pydicom inflates a deflated file as a whole, whatever it holds: 1.5 MB of it can be gigabytes. Here it is inflated as
far as the header reaches, and then as far as the pixels that the header promises.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import pydicom
from pydicom.filereader import read_dataset, read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from pe_app.common.errors import TooLarge

MAX_BYTES = 1 << 30
"""What one file may unpack to, and what its pixels may take: 512 x 512 x 2048 of 16 bits."""

HEADER_BYTES = 16 << 20
"""How far a deflated file is inflated for its header; private elements of scanners take a few megabytes at most."""

_SIZE = ("Rows", "Columns", "BitsAllocated", "SamplesPerPixel", "NumberOfFrames")
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)


def read_header(path: Path, tags: Sequence[str] | None = None, *, force: bool = True) -> pydicom.Dataset:
    """All that stands before the pixels.

    Args:
        path: the file.
        tags: keywords of the elements that are wanted; by default all.
        force: whether a file without preamble is read, too.

    Raises:
        Exception: whatever pydicom raises on a damaged file.
    """
    wanted = list(tags) if tags is not None else None
    if not _is_deflated(path):
        with path.open("rb") as file:
            return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted, force=force)
    return _inflated(path, HEADER_BYTES, header_only=True)


def read_whole(path: Path, *, force: bool = True) -> pydicom.Dataset:
    """A file with its pixels, as they are stored.

    Raises:
        TooLarge: if it unpacks to more than its header promises, or that is more than ``MAX_BYTES``.
        Exception: whatever pydicom raises on a damaged file.
    """
    header = read_header(path, _SIZE, force=force)
    promised = 1
    for keyword, absent in (("Rows", 1), ("Columns", 1), ("BitsAllocated", 8), ("SamplesPerPixel", 1)):
        promised *= int(header.get(keyword) or absent)
    promised *= int(header.get("NumberOfFrames") or 1)
    if promised // 8 > MAX_BYTES:
        raise TooLarge(f"its pixels take {promised / 8 / 2**30:.1f} GiB, more than 1 is not read")
    if not _is_deflated(path):
        return pydicom.dcmread(path, force=force)
    return _inflated(path, promised // 8 + HEADER_BYTES, header_only=False)


def _is_deflated(path: Path) -> bool:
    """Whether the file's meta information names the deflated transfer syntax."""
    with path.open("rb") as file:
        start = file.read(132 + 1024)
    return start[128:132] == b"DICM" and DeflatedExplicitVRLittleEndian.encode() in start


def _inflated(path: Path, limit: int, *, header_only: bool) -> pydicom.Dataset:
    meta = read_file_meta_info(path)
    place = 132 + 12 + int(meta.FileMetaInformationGroupLength)
    with path.open("rb") as file:
        file.seek(place)
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), limit + 1)
    if len(inflated) > limit and not header_only:
        raise TooLarge(f"it unpacks to more than {limit >> 20} MiB, which its header does not promise")
    stop = _is_pixels if header_only else None
    dataset = read_dataset(io.BytesIO(inflated[:limit]), is_implicit_VR=False, is_little_endian=True, stop_when=stop)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian  # as it is now
    dataset.file_meta = meta
    return dataset


def _is_pixels(tag: object, _vr: str | None, _length: int) -> bool:
    return tag in _PIXELS
