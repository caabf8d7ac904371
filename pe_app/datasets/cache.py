"""Files that are prepared once and then read at disk speed, memory-mapped.

A file is whole or absent, and named after the content it was made from: a file of another image, annotation, encoder
or setting has another name, so that nothing stale is ever read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pe_app.datasets.sources import StudySource, naming
from pe_app.files import replacing, write_durably
from pe_app.lungs import SliceRange, lung_range
from pe_app.progress import Progress, ProgressCallback, silent
from pe_app.volume import Volume
from pe_app.volume_io import read_volume


@dataclass(frozen=True)
class PreparedFile:
    """What was prepared of one study: its name, the SHA-256 of its voxels, and the file."""

    study: str
    image_sha256: str
    path: Path


def prepare_arrays(
    sources: Sequence[StudySource],
    task: str,
    key: str,
    make: Callable[[Volume], NDArray[np.float16]],
    cache_dir: Path,
    progress: ProgressCallback = silent,
) -> tuple[PreparedFile, ...]:
    """One float16 array a study, made once by ``make`` and kept under the identity of its image and ``key``."""
    files = []
    for number, source in enumerate(sources):
        progress(Progress(task, number, len(sources), source.study.study))
        with naming(source.study):
            image, volume = image_of(source, cache_dir)
            path = cache_dir / f"{image}-{key}.npy"
            if not holds(path, np.dtype(np.float16), None):
                array = make(volume or read_volume(source.study.path))
                with replacing(path) as temporary:
                    np.save(temporary, array)
        files.append(PreparedFile(source.study.study, image, path))
    progress(Progress(task, len(sources), len(sources)))
    return tuple(files)


def image_of(source: StudySource, cache_dir: Path) -> tuple[str, Volume | None]:
    """SHA-256 of the voxels, and the volume where it had to be read for that: remembered by the files' bytes."""
    note = cache_dir / "images" / source.files_sha256
    if note.is_file():
        return note.read_text(), None
    volume = read_volume(source.study.path)
    write_durably(note, volume.sha256)
    return volume.sha256, volume


def holds(path: Path, dtype: np.dtype[np.void] | np.dtype[np.float16], shape: tuple[int, ...] | None) -> bool:
    """Whether a cache file is there and whole; one that a failing disk cut short is made again."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.dtype == dtype and shape in (None, array.shape)


def lung_of(source: StudySource, cache_dir: Path) -> SliceRange:
    """The lung range: remembered by the files' bytes."""
    note = cache_dir / "lungs" / source.files_sha256
    if not note.is_file():
        lung = lung_range(read_volume(source.study.path))
        write_durably(note, f"{lung.first} {lung.last}")
        return lung
    first, last = note.read_text().split()
    return SliceRange(int(first), int(last))
