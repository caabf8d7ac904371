"""Files that are prepared once and then read at disk speed, memory-mapped.

A file is whole or absent, and named after the content it was made from: a file of another image, annotation, encoder
or setting has another name, so that nothing stale is ever read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pe_app.common import distributed
from pe_app.common.errors import InputError
from pe_app.common.files import replacing, write_durably
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.common.worker_pool import ProcessEnded, Processes
from pe_app.ct.lungs import SliceRange, lung_range
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume
from pe_app.training.datasets.sources import StudySource, naming

Begun = TypeVar("Begun")

STUDIES_A_PROCESS = 4
"""A process is started for at least so many studies."""

LEFTOVER_SECONDS = 3600.0
"""An unfinished file that nobody touched for so long is of a process that was killed."""


@dataclass(frozen=True)
class PreparedFile:
    """What was prepared of one study: its name, the SHA-256 of its voxels, and the file."""

    study: str
    image_sha256: str
    path: Path


@dataclass(frozen=True)
class Preparation:
    """How missing files are made.

    Attributes:
        workers: processes that read and prepare studies; with 1 this one does.
        limit_bytes: how large the folder of a cache may grow; None for as large as its disk.
    """

    workers: int = 1
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"workers must be at least 1, got {self.workers}")

    def processes_for(self, studies: int) -> int:
        """How many are worth their start, which takes as long as some studies."""
        return max(1, min(self.workers, studies // STUDIES_A_PROCESS))


IN_THIS_PROCESS = Preparation()


@dataclass(frozen=True, eq=False)
class Entry:
    """A file of a cache, which is there or has to be made.

    Attributes:
        source: its study.
        folder: of the cache.
        key: identity of all that it is made with, beside the image.
        dtype: of its array.
        shape: of its array; None where only the file knows.
        nbytes: its size, at most.
    """

    source: StudySource
    folder: Path
    key: str
    dtype: np.dtype[np.void] | np.dtype[np.float16]
    shape: tuple[int, ...] | None
    nbytes: int

    def file(self, image_sha256: str) -> PreparedFile:
        """The file, whether it is there or not."""
        return PreparedFile(self.source.study.study, image_sha256, self.folder / f"{image_sha256}-{self.key}.npy")

    def find(self) -> PreparedFile | None:
        """The file where it is there and whole; one that a failing disk cut short is made again."""
        image = known_image(self.source, self.folder)
        file = self.file(image)
        return file if image and holds(file.path, self.dtype, self.shape) else None


JobEntry = TypeVar("JobEntry", bound=Entry)


def prepare(
    task: str,
    entries: Sequence[JobEntry],
    begin: Callable[[JobEntry], Begun],
    finish: Callable[[JobEntry, Begun, ProgressCallback], PreparedFile],
    preparation: Preparation,
    progress: ProgressCallback,
    *,
    units: int = 1,
    refused: Callable[[InputError], None] | None = None,
) -> list[PreparedFile | None]:
    """All files of a cache, made where they are missing; each of several processes (``distributed``) makes its part.

    Args:
        task: as the progress tells it.
        entries: the files.
        begin: what a process of ``preparation`` does for a file; its argument and result are sent to and fro.
        finish: the rest, done here; tells its progress in ``units`` steps.
        preparation: how.
        progress: told after every study; may raise ``Cancelled``.
        units: steps of ``finish``.
        refused: told of a study that cannot be used, whose file is then None; by default the error is raised.

    Raises:
        InputError: if a study cannot be used; if there is no room for what is missing, before any of it is made.
    """
    found = distributed.map_sharded(Entry.find, entries)
    missing = [entry for entry, file in zip(entries, found, strict=True) if file is None]
    if missing:
        needed = sum(entry.nbytes for entry in missing)
        distributed.from_main(lambda: _check_room(missing[0].folder, len(missing), needed, preparation.limit_bytes))

    own = distributed.shard(missing)
    made: dict[JobEntry, PreparedFile | None] = {}

    def tell(steps: int, study: str) -> None:
        done = len(missing) * steps / max(len(own), 1)  # the other processes are taken to be as far as this one
        known = units * (len(entries) - len(missing))
        progress(Progress(task, known + round(done), units * len(entries), study))

    def tell_more(before: int, study: str, part: Progress) -> None:
        tell(before + part.done, study)

    with distributed.raised_together(), Processes(preparation.processes_for(len(own))) as processes:
        tell(0, "")
        for entry, begun in processes.run(begin, own):
            study = entry.source.study
            report = partial(tell_more, units * len(made), study.study)
            try:
                with naming(study):
                    made[entry] = finish(entry, _unless_failed(begun), report)
            except InputError as error:
                if refused is None:
                    raise
                refused(error)
                made[entry] = None
            tell(units * len(made), study.study)
    files = iter(distributed.gather_shards([made[entry] for entry in own]))
    prepared = [file or next(files) for file in found]
    for file in prepared if distributed.world_size() > 1 else ():
        if file is not None and not file.path.is_file():
            raise InputError(f"{file.path}: made by another process, but not to be seen here: all need the same folder")
    return prepared


def prepare_arrays(
    sources: Sequence[StudySource],
    task: str,
    key: str,
    make: Callable[[Volume], NDArray[np.float16]],
    cache_dir: Path,
    progress: ProgressCallback = silent,
) -> tuple[PreparedFile, ...]:
    """One float16 array a study, made once by ``make`` and kept under the identity of its image and ``key``."""
    half = np.dtype(np.float16)
    entries = [Entry(source, cache_dir, key, half, None, 0) for source in sources]

    def begin(entry: Entry) -> tuple[str, NDArray[np.float16]]:
        image, volume = image_of(entry.source, cache_dir)
        return image, make(volume or read_volume(entry.source.study.path))

    def keep(entry: Entry, begun: tuple[str, NDArray[np.float16]], _: ProgressCallback) -> PreparedFile:
        image, array = begun
        file = entry.file(image)
        with replacing(file.path) as temporary:
            np.save(temporary, array)
        return file

    files = prepare(task, entries, begin, keep, IN_THIS_PROCESS, progress)
    return tuple(file for file in files if file is not None)


def image_of(source: StudySource, cache_dir: Path) -> tuple[str, Volume | None]:
    """SHA-256 of the voxels, and the volume where it had to be read for that: remembered by the files' bytes."""
    if image := known_image(source, cache_dir):
        return image, None
    volume = read_volume(source.study.path)
    write_durably(_image_note(source, cache_dir), volume.sha256)
    return volume.sha256, volume


def known_image(source: StudySource, cache_dir: Path) -> str:
    """SHA-256 of the voxels where it is remembered, else empty."""
    note = _image_note(source, cache_dir)
    return note.read_text() if note.is_file() else ""


def _check_room(folder: Path, files: int, needed: int, limit: int | None) -> None:
    """InputError unless so many bytes more find room on the disk and under the limit."""
    there = [file for file in folder.glob("*") if file.is_file()] if folder.is_dir() else []
    for leftover in there:
        if leftover.name.startswith(".") and time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
            leftover.unlink(missing_ok=True)
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free
    missing = f"cache {folder}: {files} files are still missing, {in_gigabytes(needed)}"
    if needed > free:
        raise InputError(f"{missing}, but its disk has {in_gigabytes(free)} left: make room or choose another folder")
    if limit is not None:
        used = sum(file.stat().st_size for file in there)
        if used + needed > limit:
            raise InputError(
                f"{missing}; with the {in_gigabytes(used)} that it holds that is beyond the limit of "
                f"{in_gigabytes(limit)}: raise the limit, or remove what is not needed any more"
            )


def in_gigabytes(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.3g} GB"


def _unless_failed(begun: Begun | Exception) -> Begun:
    """What a process has done, or what it raised."""
    if isinstance(begun, ProcessEnded):
        raise InputError(f"{begun}: go on with fewer workers") from begun
    if isinstance(begun, Exception):
        raise begun
    return begun


def _image_note(source: StudySource, cache_dir: Path) -> Path:
    return cache_dir / "images" / source.files_sha256


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
        with naming(source.study):
            lung = lung_range(read_volume(source.study.path))
        write_durably(note, f"{lung.first} {lung.last}")
        return lung
    first, last = note.read_text().split()
    return SliceRange(int(first), int(last))
