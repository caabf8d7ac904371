"""The verb watch: studies are detected as they arrive in a folder or an archive."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from pe_app.cli.detect import EXIT_STOPPED, ended_by_signal, outcome_line
from pe_app.cli.options import (
    ArchiveUser,
    CaFile,
    Date,
    Description,
    Model,
    PasswordFile,
    Patient,
    archive_access,
    archive_query,
    progress_bars,
)
from pe_app.cli.publishing import Dicom, Send, dicom_publisher
from pe_app.common.errors import InputError


def watch(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder in which DICOM files or .nrrd and .nii arrive, or the address "
            "of an archive: https://pacs.example/dicom-web"
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the results and the worklist, index.html; a later run resumes there.")
    ],
    model: Model = None,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two checks.")] = 30,
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds without a change after which a study is complete.")
    ] = 60,
    once: Annotated[bool, typer.Option("--once", help="Handle what is there and end, as for cron.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per study.")] = False,
    dicom: Dicom = False,
    send: Send = "",
    user: ArchiveUser = "",
    password_file: PasswordFile = None,
    ca: CaFile = None,
    patient: Patient = "",
    date: Date = "",
    description: Description = "",
    days: Annotated[
        int,
        typer.Option(min=1, help="Of an archive: studies of this many days up to today, where --date is not given."),
    ] = 2,
) -> None:
    """Detect studies as they arrive, each once and in order; results and worklist as detect writes them.

    Ends at Ctrl-C or SIGTERM; the study in progress is detected by the next run. Exit code 0 after --once.
    """
    from pe_app.model.detector import Detector, default_model
    from pe_app.pacs.dicomweb import Archive
    from pe_app.results.arrivals import WatchedArchive, WatchedFolder, WatchSettings
    from pe_app.results.arrivals import watch as watch_source
    from pe_app.results.batch import PAGE, run_batch

    in_archive = "://" in source
    if user and in_archive and send and urlsplit(send)[:2] != urlsplit(source)[:2]:
        raise InputError(f"--send {send}: the password is the one of {source}: send from a second command, or without")
    access = partial(archive_access, user=user, password_file=password_file, ca=ca)
    watched = (
        WatchedArchive(Archive(access(source)), archive_query(patient, date, description), days)
        if in_archive
        else WatchedFolder(Path(source), out)
    )
    publish = dicom_publisher(dicom, access(send) if send else None)
    chosen = model or default_model()
    detector = Detector.load(chosen) if chosen else Detector.untrained()
    piped = None if sys.stdout.isatty() else sys.stdout
    try:
        with ended_by_signal(), progress_bars() as progress:
            published_as = f"dicom {send}" if publish else ""
            run = partial(
                run_batch, detector=detector, out=out, publish=publish, published_as=published_as, progress=progress
            )
            with closing(watch_source(watched, out, run, WatchSettings(every, settle, once=once))) as outcomes:
                for outcome in outcomes:
                    typer.echo(json.dumps(outcome.to_json()) if as_json else outcome_line(outcome), file=piped)
    except KeyboardInterrupt:
        typer.echo(f"Stopped; the same command resumes. Worklist: {out / PAGE}.", err=True)
        raise typer.Exit(EXIT_STOPPED) from None
    typer.echo(f"Worklist: {out / PAGE}. Research use only, not for diagnosis.", err=as_json)
