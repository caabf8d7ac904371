"""Studies of a list with what they are read from, identified by the bytes of their files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pe_app.annotation.record import ReviewedSlice
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common import distributed
from pe_app.common.errors import InputError
from pe_app.common.files import files_below, write_durably
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.ct.volume_io import read_volume
from pe_app.studies import Study


@dataclass(frozen=True, eq=False)
class StudySource:
    """A study of the list with what it was read from. Outlines stay on the disk: thousands would fill the memory.

    Attributes:
        study: its row of the list.
        files_sha256: of the bytes of its image files; knows that an image is the same without decoding it.
        reviewed: its reviewed slices; None for a label-only study.
        annotation_sha256: identity of the reviewed slices and their outlines; empty for a label-only study.
        judged: whether readers decided on candidates of a model.
    """

    study: Study
    files_sha256: str
    reviewed: tuple[ReviewedSlice, ...] | None = None
    annotation_sha256: str = ""
    judged: bool = False

    @classmethod
    def read(cls, study: Study, files_sha256: str) -> StudySource:
        """With the study's annotation, where it has one."""
        annotation = _annotation(study)
        if annotation is None:
            return cls(study, files_sha256)
        return cls(study, files_sha256, annotation.slices, _identity(annotation), bool(annotation.decisions))

    def annotation(self) -> SparseAnnotation | None:
        """The reviewed slices with their outlines, read now.

        Raises:
            InputError: if they are not those that were read first.
        """
        annotation = _annotation(self.study) if self.reviewed is not None else None
        if annotation is not None and _identity(annotation) != self.annotation_sha256:
            raise InputError(f"{self.study.annotation}: was changed while it was being read: start again")
        return annotation


SETTLED_SECONDS = 2.0
"""A file that was changed within that time might be changed again and still show the same time."""


def read_sources(
    studies: Sequence[Study],
    annotations: bool = True,
    progress: ProgressCallback = silent,
    cache_dir: Path | None = None,
) -> tuple[StudySource, ...]:
    """Read the annotations of all studies and the identity of their images.

    Args:
        studies: any studies.
        annotations: whether those are wanted.
        progress: told before every study; may raise ``Cancelled``.
        cache_dir: where the identity of files is remembered by their places, sizes and times, so that those of
            thousands of studies are read once and not whenever a training goes on; by default all are read.

    Raises:
        InputError: that names the study whose files are missing or cannot be used.
    """
    numbers = range(len(studies))

    def identify(number: int) -> str:
        study = studies[number]
        progress(Progress("read the studies", number, len(studies), study.study))
        with naming(study):
            try:
                return _files_sha256(study.path, cache_dir)
            except OSError as error:
                raise InputError(f"{study.path} cannot be read ({error.strerror}): correct the study list") from error

    identities = distributed.map_sharded(identify, numbers)
    sources = []
    with distributed.raised_together():
        for study, files_sha256 in zip(studies, identities, strict=True):
            with naming(study):
                sources.append((StudySource.read if annotations else StudySource)(study, files_sha256))
    progress(Progress("read the studies", len(studies), len(studies)))
    return tuple(sources)


@contextmanager
def naming(study: Study) -> Iterator[None]:
    """Errors in a study's files say which study it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"study {study.study}: {error}") from error


def _identity(annotation: SparseAnnotation) -> str:
    """SHA-256 of what was reviewed and outlined."""
    content = hashlib.sha256(json.dumps(annotation.to_json(), sort_keys=True).encode())
    for index in sorted(annotation.masks):
        content.update(np.packbits(annotation.masks[index]).tobytes())
    return content.hexdigest()


def _annotation(study: Study) -> SparseAnnotation | None:
    """The reviewed slices of a study; its CT is decoded only where Slicer saved outlines on a part of the grid."""
    if study.annotation is None:
        return None
    try:
        return SparseAnnotation.read(study.annotation)
    except InputError:
        return SparseAnnotation.read(study.annotation, read_volume(study.path))


def _files_sha256(path: Path, cache_dir: Path | None) -> str:
    """SHA-256 of a file's bytes, or of all files of a folder in the order of their names."""
    files = [entry for entry in files_below(path) if entry.exists()] if path.is_dir() else [path]
    seen = [(str(entry.resolve()), entry.stat().st_size, entry.stat().st_mtime_ns) for entry in files]
    note = None
    if cache_dir is not None:
        note = cache_dir / "files" / hashlib.sha256(json.dumps(seen).encode()).hexdigest()
        if note.is_file():
            return note.read_text()
    content = hashlib.sha256()
    for entry in files:
        with entry.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    last = max((changed for _, _, changed in seen), default=0)
    if note is not None and time.time() - last / 1e9 > SETTLED_SECONDS:
        write_durably(note, content.hexdigest())
    return content.hexdigest()
