"""The verb detect: one study, or many with a worklist."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from pe_app.cli.options import (
    EXIT_INCOMPLETE,
    EXIT_REFUSED,
    Accept,
    ArchiveUser,
    CaFile,
    Limits,
    Model,
    PasswordFile,
    Refuse,
    archive_access,
    progress_bars,
)
from pe_app.cli.publishing import Dicom, Send, dicom_publisher
from pe_app.common.errors import InputError, UnfitStudy

if TYPE_CHECKING:
    from pe_app.model.detector import Detector
    from pe_app.results.batch import Finished
    from pe_app.results.find_studies import BatchStudy, Found
    from pe_app.results.outcome import Outcome

EXIT_STOPPED = 130
"""Of every program that Ctrl-C stopped."""


def detect(
    studies: Annotated[
        list[Path],
        typer.Argument(
            metavar="STUDY...",
            help="DICOM folder, .nii, .nii.gz or .nrrd of a "
            "chest CT; several of them, a folder of studies or a study list "
            "(CSV) make a worklist.",
        ),
    ],
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results: detection.json, index.html, pictures, attention.",
            show_default="./STUDY-detection; of many ./detections, where a later run resumes",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the detection as JSON; of many, one line per study.")
    ] = False,
    series: Annotated[str | None, typer.Option(help="Series Instance UID, where the folder holds several.")] = None,
    full_resolution: Annotated[bool, typer.Option(help="Also write the attention on the CT's grid.")] = False,
    accept: Accept = None,
    refuse: Refuse = None,
    limits: Limits = None,
    dicom: Dicom = False,
    send: Send = "",
    user: ArchiveUser = "",
    password_file: PasswordFile = None,
    ca: CaFile = None,
) -> None:
    """Probability of embolism, with the evidence and where to look; of many studies as a worklist.

    Exit code 0: analysed, every one. 3: refused, at least one. 4: at least one of many could not be read or analysed,
    or one was not published as DICOM. 2: nothing was done, for the reason in the message.
    """
    from pe_app.ct.quality import read_limits
    from pe_app.model.detector import Detector, default_model
    from pe_app.results.find_studies import find_studies

    found = find_studies(studies)
    if series and not found.single:
        raise InputError("--series chooses a series of one study: give that study alone")
    publish = dicom_publisher(dicom, archive_access(send, user, password_file, ca) if send else None)
    chosen = model or default_model()
    detector = Detector.load(chosen) if chosen else Detector.untrained()
    detector = detector.with_limits(read_limits(limits, accept or (), refuse or ()))
    if found.single:
        _one(found.studies[0], detector, out, series, publish, as_json=as_json, full_resolution=full_resolution)
    else:
        published_as = f"dicom {send}" if publish else ""
        folder = out or Path("detections")
        _many(found, detector, folder, publish, published_as, as_json=as_json, full_resolution=full_resolution)


def _one(
    study: BatchStudy,
    detector: Detector,
    out: Path | None,
    series: str | None,
    publish: Callable[[Finished], None] | None,
    *,
    as_json: bool,
    full_resolution: bool,
) -> None:
    from pe_app.ct.volume_io import read_volume
    from pe_app.model.detector import DetectionResult
    from pe_app.results.batch import Finished
    from pe_app.results.result_files import write_result
    from pe_app.results.words import verdict

    volume = None
    try:
        volume = read_volume(study.path, series=series)
        with progress_bars() as progress:
            result = detector.detect(volume, progress)
    except UnfitStudy as error:
        result = DetectionResult(detector.refuse_unread(error), None)
    name = study.path.resolve().name
    folder = out or Path(f"{name.split('.')[0]}-detection")
    write_result(result, volume, folder, name, full_resolution=full_resolution)
    detection = result.detection
    if as_json:
        typer.echo(json.dumps(detection.to_json()))
    else:
        typer.echo(verdict(detection))
        for reason in detection.reasons:
            typer.echo(f"  {reason.code}: {reason.message}")
        for candidate in detection.candidates[:5]:
            place = f", {candidate.place}" if candidate.place else ""
            typer.echo(
                f"  candidate at slice {candidate.slice_index} (z {candidate.z_mm:.0f} mm){place}, "
                f"slab probability {candidate.slab_probability:.2f}"
            )
        typer.echo(f"Written to {folder}. Research use only, not for diagnosis.")
    if publish:
        try:
            if volume is None:
                raise InputError("there are no DICOM objects: its series cannot be read as a CT")
            publish(Finished(study, folder, volume, result))
        except InputError as error:
            typer.echo(f"pe-app: not published: {error}", err=True)
            raise typer.Exit(EXIT_INCOMPLETE) from None
    if detection.status == "refused":
        raise typer.Exit(EXIT_REFUSED)


def _many(
    found: Found,
    detector: Detector,
    out: Path,
    publish: Callable[[Finished], None] | None,
    published_as: str,
    *,
    as_json: bool,
    full_resolution: bool,
) -> None:
    from pe_app.results.batch import PAGE, run_batch
    from pe_app.results.outcome import Share

    for line in found.said:
        typer.echo(line, err=True)
    # the bars take over a terminal's output; what is piped elsewhere must not end in them
    piped = None if sys.stdout.isatty() else sys.stdout
    outcomes: list[Outcome] = []
    try:
        with ended_by_signal(), progress_bars() as progress, ExitStack() as stack:
            batch = run_batch(
                found.studies,
                detector,
                out,
                total=len(found.studies),
                full_resolution=full_resolution,
                publish=publish,
                published_as=published_as,
                progress=progress,
            )
            for outcome in stack.enter_context(closing(batch)):
                outcomes.append(outcome)
                typer.echo(json.dumps(outcome.to_json()) if as_json else outcome_line(outcome), file=piped)
    except KeyboardInterrupt:
        typer.echo(
            f"Stopped: {len(outcomes)} of {len(found.studies)} are done and kept in {out}; the same command resumes.",
            err=True,
        )
        raise typer.Exit(EXIT_STOPPED) from None
    share = Share.of(outcomes)
    problems = sum(bool(outcome.problem) for outcome in outcomes)
    said = [f"{share}{', ' if share.details else ''}{share.details}"]
    said += [f"{problems} could not be published: run it again"] if problems else []
    said += sorted({f"{outcome.not_clinical}: not a clinical result" for outcome in outcomes if outcome.not_clinical})
    typer.echo(f"{'. '.join(said)}. Worklist: {out / PAGE}. Research use only, not for diagnosis.", err=as_json)
    if share.failed or problems:
        raise typer.Exit(EXIT_INCOMPLETE)
    if share.refused:
        raise typer.Exit(EXIT_REFUSED)


def outcome_line(outcome: Outcome) -> str:
    """What is printed for a study as soon as it is done."""
    detection = outcome.detection
    if detection is None or detection.probability is None:
        return f"  not analysed  {outcome.study}: {outcome.message}"
    first = detection.candidates[0] if detection.candidates else None
    where = ", ".join(part for part in (f"slice {first.slice_index}", first.place) if part) if first else ""
    notes = [outcome.not_clinical.lower(), where, outcome.problem, "unchanged, skipped" if outcome.known else ""]
    return f"  {detection.probability:.3f}  {outcome.study}" + "".join(f"; {note}" for note in notes if note)


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """A request to end, as a shutdown sends it, ends the batch as Ctrl-C does: knowingly, with no study to blame."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
