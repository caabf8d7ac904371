"""The import of a public set: each mask proven on its CT and made a sparse annotation, the study list written.

A CT stays where it is and is listed there, unless copies are wanted. A study is imported when its record is written,
last of all, so that the same call resumes after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from pe_app.annotation.record import ReviewedSlice
from pe_app.annotation.sparse import SparseAnnotation, slice_schedule
from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.common.worker_pool import Processes
from pe_app.ct.source_series import source_path, write_source
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume, write_volume
from pe_app.public_data.found import FoundStudy, PublicSet, SliceAnswers
from pe_app.public_data.proof import check_fit, fit_of
from pe_app.studies import Label, Study, read_studies, write_studies

RECORDS = Path(".pe", "public")
LISTED_EVERY = 100
"""The list is written after this many studies, and at the end."""


@dataclass(frozen=True)
class DatasetImport:
    """How a public set is imported.

    Attributes:
        every_mm: about how far apart the reviewed slices lie; None for every slice.
        copy: write each CT into the folder of studies, as the server needs it; else it is listed where it lies.
        workers: processes.
    """

    every_mm: float | None = 10.0
    copy: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        if self.every_mm is not None and not 0 < self.every_mm < 1000:
            raise InputError(f"--every-mm must be above 0, or 'all', got {self.every_mm}")


@dataclass(frozen=True)
class DatasetLine:
    """What became of one study.

    Attributes:
        status: ``imported``, ``known`` from an earlier call, or ``failed``.
        study: its id.
        label: of the study.
        reviewed: slices of its annotation; 0 of a study with a label alone.
        embolism: slices with embolism among them.
        fit: how its mask lies on the CT, in words; "" without a mask or embolism.
        reason: why it failed.
    """

    status: Literal["imported", "known", "failed"]
    study: str
    label: Label = ""
    reviewed: int = 0
    embolism: int = 0
    fit: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Estimate:
    """What is left to do, told by the first study: studies, seconds with all processes, bytes on the disk."""

    studies: int
    seconds: float
    nbytes: int


def import_dataset(
    data_set: PublicSet,
    download: Path,
    studies: Path,
    settings: DatasetImport | None = None,
    progress: ProgressCallback = silent,
    estimated: Callable[[Estimate], None] = lambda estimate: None,
) -> tuple[DatasetLine, ...]:
    """Import all studies of a download into a folder of studies.

    Args:
        data_set: which one (``public_set``).
        download: the folder that it was unpacked to.
        studies: folder with ``studies.csv``, ``annotations`` and ``masks``; made where missing.
        settings: how.
        progress: told after every study; may raise ``Cancelled``.
        estimated: called when the first study is done.

    Returns:
        A line for every study.

    Raises:
        InputError: if the layout is another one, there is no room, or another import is running.
    """
    settings = settings or DatasetImport()
    if not download.is_dir():
        raise InputError(f"{download}: there is no such folder; unpack the download first")
    try:
        (studies / ".pe").mkdir(parents=True, exist_ok=True)
        with FileLock(studies / ".pe" / "import.lock", timeout=0), Processes(settings.workers) as processes:
            return _Import(data_set, studies, settings, progress, processes).run(download, estimated)
    except Timeout as error:
        raise InputError(f"{studies}: another import into this folder is running: wait for it to end") from error
    except OSError as error:
        raise InputError(f"{studies}: the import stopped ({error.strerror or error}); the same call resumes") from error


@dataclass(frozen=True)
class _Job:
    """One study to import, in a process of its own."""

    found: FoundStudy
    data_set: PublicSet
    studies: Path
    settings: DatasetImport

    @property
    def record(self) -> Path:
        return self.studies / RECORDS / f"{self.found.study}.json"

    @property
    def annotation(self) -> Path:
        return self.studies / "annotations" / f"{self.found.study}.json"

    @property
    def mask(self) -> Path:
        return self.studies / "masks" / f"{self.found.study}.nrrd"

    @property
    def copy(self) -> Path:
        served = (self.studies / "studies.csv").is_file() and (self.studies / "volumes").is_dir()
        return (self.studies / "volumes" if served else self.studies) / f"{self.found.study}.nrrd"

    def identity(self) -> str:
        """Of all that the study's files are made from, but the voxels of its CT."""
        mask = self.found.mask.stat() if self.found.mask else None
        answers = self.found.answers
        made_from = [
            *(str(self.found.ct), str(self.found.mask), self.settings.every_mm, self.settings.copy),
            *((mask.st_size, mask.st_mtime_ns) if mask else ()),
            *((answers.images, sorted(answers.embolism)) if answers else ()),
        ]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()

    def known(self) -> DatasetLine | None:
        """What an earlier call wrote of it; None where it did not finish or something has changed since."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            line = DatasetLine(**record["line"])
            whole = (not line.reviewed or self.annotation.is_file()) and (not self.settings.copy or self.copy.is_file())
            return replace(line, status="known") if record["identity"] == self.identity() and whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


class _Import:
    def __init__(
        self,
        data_set: PublicSet,
        studies: Path,
        settings: DatasetImport,
        progress: ProgressCallback,
        processes: Processes,
    ) -> None:
        self.data_set, self.studies, self.settings = data_set, studies, settings
        self.progress, self.processes = progress, processes
        self.list = studies / "studies.csv"
        self.jobs: list[_Job] = []
        self.done: dict[str, DatasetLine] = {}

    def run(self, download: Path, estimated: Callable[[Estimate], None]) -> tuple[DatasetLine, ...]:
        found = self.data_set.find(download)
        self.jobs = [_Job(one, self.data_set, self.studies, self.settings) for one in found]
        to_read = []
        for job in self.jobs:
            line = job.known() if _needs_reading(job) else DatasetLine("imported", job.found.study, job.found.label)
            if line is None:
                to_read.append(job)
            else:
                self.done[line.study] = line
        task = f"import {self.data_set.name}"
        self.progress(Progress(task, len(self.done), len(self.jobs)))
        try:
            began = time.monotonic()
            for number, (job, outcome) in enumerate(self._outcomes(to_read), start=1):
                self.done[job.found.study] = _line_of(job, outcome)
                if number == 1:
                    self._estimate(job, len(to_read) - 1, time.monotonic() - began, estimated)
                if number % LISTED_EVERY == 0:
                    self._write_list()
                self.progress(Progress(task, len(self.done), len(self.jobs), job.found.study))
        finally:
            self._write_list()
        return tuple(self.done[job.found.study] for job in self.jobs)

    def _outcomes(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, DatasetLine | Exception]]:
        """The first study alone, so that its time and space tell those of the others."""
        yield from Processes(1).run(_import_study, jobs[:1])
        yield from self.processes.run(_import_study, jobs[1:])

    def _estimate(self, job: _Job, left: int, seconds: float, estimated: Callable[[Estimate], None]) -> None:
        written = sum(
            path.stat().st_size
            for path in (job.annotation, job.annotation.with_suffix(".seg.nrrd"), job.mask, job.copy)
            if path.is_file()
        )
        estimate = Estimate(left, seconds * left / self.settings.workers, written * left)
        if estimate.nbytes > shutil.disk_usage(self.studies).free:
            free = shutil.disk_usage(self.studies).free / 1e9
            raise InputError(
                f"{self.studies}: {left} studies need about {estimate.nbytes / 1e9:.1f} GB, but {free:.1f} GB are "
                "free: make room, or leave out --copy"
            )
        estimated(estimate)

    def _write_list(self) -> None:
        """Add the studies that are done; of those that are listed, label and annotation follow the import."""
        listed = {study.study: study for study in read_studies(self.list)} if self.list.exists() else {}
        for job in self.jobs:
            found = job.found
            line = self.done.get(found.study)
            if line is None or line.status == "failed":
                continue
            row = listed.get(found.study) or Study(found.study, found.ct, found.patient, split=found.split)
            listed[found.study] = replace(
                row,
                path=job.copy if self.settings.copy and _needs_reading(job) else found.ct.resolve(),
                label=line.label,
                annotation=job.annotation if line.reviewed else None,
                source=self.data_set.name,
                terms=self.data_set.terms.terms,
                attributes=found.attributes,
            )
        if self.done:
            write_studies(tuple(listed.values()), self.list)


def _needs_reading(job: _Job) -> bool:
    """Whether a CT has to be read: for its mask or answers, or to be copied."""
    return job.found.mask is not None or job.found.answers is not None or job.settings.copy


def _line_of(job: _Job, outcome: DatasetLine | Exception) -> DatasetLine:
    if isinstance(outcome, DatasetLine):
        return outcome
    return DatasetLine("failed", job.found.study, reason=str(outcome) or type(outcome).__name__)


def _import_study(job: _Job) -> DatasetLine:
    """Read, prove and write one study.

    Raises:
        InputError: if CT and mask cannot be used together.
    """
    found, data_set = job.found, job.data_set
    volume = replace(read_volume(found.ct), name=found.study)
    annotation, label, fit = None, found.label, None
    if found.mask is not None:
        mask = np.asarray(data_set.read_mask(found.mask, volume))
        fit = fit_of(mask, volume) if mask.any() else None
        if fit is not None:
            check_fit(fit, found.study)
        label = "positive" if mask.any() else "negative"
        annotation = _sparse(mask, volume, job.settings.every_mm, data_set.name)
        number = np.uint8 if mask.max() < 256 else np.int16
        write_volume(volume.with_voxels(mask.astype(number)), job.mask)
    elif found.answers is not None:
        annotation = _answered(found.answers, volume, job.settings.every_mm, data_set.name)
    if annotation is not None:
        annotation.write(job.annotation, volume)
    if job.settings.copy:
        if volume.source is not None:
            write_source(replace(volume.source, image_sha256=volume.sha256), source_path(job.copy))
        write_volume(volume, job.copy)
    states = [entry.state for entry in annotation.slices] if annotation else []
    line = DatasetLine("imported", found.study, label, len(states), states.count("embolism"), str(fit or ""))
    write_durably(job.record, json.dumps({"identity": job.identity(), "line": asdict(line)}))
    return line


def _sparse(mask: NDArray[np.generic], volume: Volume, every_mm: float | None, reader: str) -> SparseAnnotation:
    """The mask on the slices of the schedule; where they all miss it, its largest slice is reviewed, too [ours]."""
    slices = set(_reviewed(volume, every_mm))
    areas = np.count_nonzero(mask, axis=(1, 2))
    if areas.any() and not areas[sorted(slices)].any():
        slices.add(int(areas.argmax()))
    return SparseAnnotation.from_mask(volume, volume.with_voxels(mask), sorted(slices), f"{reader} reference")


def _answered(answers: SliceAnswers, volume: Volume, every_mm: float | None, reader: str) -> SparseAnnotation:
    """The answers on the slices of the schedule, as embolism without an outline or none."""
    if volume.source is None or not volume.source.instances:
        raise InputError(f"{volume.name}: answers belong to DICOM instances, and this CT is not read from DICOM")
    uids = [instance.sop_instance_uid for instance in volume.source.instances]
    unknown = answers.embolism - set(uids)
    if len(uids) != answers.images or unknown:
        raise InputError(
            f"{volume.name}: {answers.images} images are answered, {len(unknown)} of those with embolism are not among "
            f"the {len(uids)} of the series: copy the study again"
        )
    positive = {index for index, uid in enumerate(uids) if uid in answers.embolism}
    slices = set(_reviewed(volume, every_mm))
    if positive and not positive & slices:
        slices.add(sorted(positive)[len(positive) // 2])
    reviewed = tuple(
        ReviewedSlice(
            index,
            float(volume.slice_z_mm[index]),
            "embolism" if index in positive else "none",
            f"{reader} reference",
            not_outlined=index in positive,
        )
        for index in sorted(slices)
    )
    return replace(SparseAnnotation.empty(volume), slices=reviewed)


def _reviewed(volume: Volume, every_mm: float | None) -> Sequence[int]:
    return range(volume.shape[0]) if every_mm is None else slice_schedule(volume, every_mm)
