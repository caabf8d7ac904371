"""One study's conversion, in a process of its own: its series are read until one is fit, and that one is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pe_app.common.errors import InputError, UnfitStudy
from pe_app.ct.dicom_headers import SliceHeader
from pe_app.ct.dicom_pixels import read_stack
from pe_app.ct.dicom_stack import arrange
from pe_app.ct.quality import QualityLimits, Reason, check_study
from pe_app.ct.source_series import SourceSeries, source_path, write_source
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import write_volume
from pe_app.pacs.importing.pseudonyms import Pseudonyms, identities_folder
from pe_app.pacs.importing.unpacking import SourceFile

SERIES_TRIED = 4
"""Of a study whose largest series is refused, as a native one is: so many are read to find one that is fit."""


@dataclass(frozen=True)
class Job:
    """One study to convert, in a process of its own."""

    study: str
    path: Path
    candidates: tuple[list[SliceHeader], ...]
    files: Mapping[Path, SourceFile]
    limits: QualityLimits
    pseudonyms: Pseudonyms | None
    key_file: Path | None


@dataclass(frozen=True)
class Converted:
    """What a process made: the series taken, the gate's reasons, and why others were not taken."""

    taken: str = ""
    reasons: tuple[Reason, ...] = ()
    faults: Mapping[str, InputError] = field(default_factory=dict)


def convert_study(job: Job) -> Converted:
    """Read the series in order of choice until one is fit, and write the best one."""
    faults: dict[str, InputError] = {}
    best: tuple[int, Volume, SourceSeries, tuple[Reason, ...]] | None = None
    for slices in job.candidates[:SERIES_TRIED]:
        try:
            volume, identity = _read_series(slices, job)
        except InputError as error:
            faults[slices[0].series] = error
            continue
        reasons = check_study(volume, job.limits)
        refused = [reason for reason in reasons if reason.refuses]
        if refused:
            faults[identity.series_uid] = UnfitStudy(refused[0].code, refused[0].message)
        worth = 0 if refused else 1 if any(reason.code == "weak_contrast" for reason in reasons) else 2
        if best is None or worth > best[0]:
            best = worth, volume, identity, reasons
        if worth == 2:
            break
    if best is None:
        return Converted(faults=faults)
    _, volume, identity, reasons = best
    if job.key_file is not None:
        private = identities_folder(job.key_file) / f"{job.study}.json"
        write_source(identity, private)
        private.chmod(0o600)
    if volume.source is not None:
        write_source(volume.source, source_path(job.path))
    write_volume(volume, job.path)  # last: from here on the study is there
    return Converted(identity.series_uid, reasons, faults)


def _read_series(slices: Sequence[SliceHeader], job: Job) -> tuple[Volume, SourceSeries]:
    """A series' Volume with what may be known of its source, and all that is known of it."""
    stack = arrange(slices)
    volume = read_stack(stack, stack.slices[0].path.parent)
    if volume.source is None:
        raise TypeError("read_stack gives a volume with its source")
    files = [job.files[one.path] for one in stack.slices]
    together = len({file.root for file in files}) == 1
    identity = replace(
        volume.source,
        root=str(files[0].root) if together else "",
        instances=tuple(
            replace(instance, file=file.name if together else f"{file.root}/{file.name}")
            for instance, file in zip(volume.source.instances, files, strict=True)
        ),
        image_sha256=volume.sha256,
    )
    pseudonyms = job.pseudonyms
    public = pseudonyms.source(identity) if pseudonyms else identity
    return replace(volume, source=public, name=job.study), identity
