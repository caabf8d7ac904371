"""The verb that brings public data sets in: import-dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pe_app.cli.options import progress_bars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pe_app.public_data.found import PublicSet
    from pe_app.public_data.run import DatasetLine, Estimate

FAILURES_SHOWN = 50


def import_dataset(
    name: Annotated[
        str,
        typer.Argument(help="fumpe, cadpe, read, rspect, nnunet (any set in its layout) or masks (CT and mask pairs)."),
    ],
    download: Annotated[Path, typer.Argument(help="Folder that the download was unpacked to.")],
    studies: Annotated[Path, typer.Option(help="Folder of studies to make or extend.")],
    every_mm: Annotated[str, typer.Option(help="About how far apart the reviewed slices lie, or 'all'.")] = "10",
    pattern: Annotated[
        str,
        typer.Option(
            help="Of masks: where the CT and the mask of a name lie, 'images/{name}.nii.gz,masks/{name}.nii.gz'."
        ),
    ] = "",
    terms: Annotated[str, typer.Option(help="Of nnunet and masks: the data's terms of use.")] = "",
    copy: Annotated[
        bool,
        typer.Option(
            "--copy", help="Write each CT into STUDIES, as pe-app serve needs it; otherwise it is listed where it lies."
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="one per core, at most 4")
    ] = None,
) -> None:
    """Turn a public data set into studies, study list and sparse annotations; the same call resumes.

    Orientation is proven: a mask that does not lie where emboli can, or fits better when flipped, is not imported.
    """
    import os

    from pe_app.common.errors import InputError
    from pe_app.public_data.run import DatasetImport
    from pe_app.public_data.run import import_dataset as run
    from pe_app.public_data.sets import public_set

    try:
        step = None if every_mm == "all" else float(every_mm)
    except ValueError as error:
        raise InputError(f"--every-mm {every_mm}: expected millimetres or 'all'") from error
    settings = DatasetImport(step, copy, workers or min(4, os.cpu_count() or 1))
    data_set = public_set(name, download, pattern, terms)
    show_terms(data_set, studies)
    with progress_bars() as progress:
        lines = run(data_set, download, studies, settings, progress, show_estimate)
    show_lines(lines)
    typer.echo(
        f"Study list: {studies / 'studies.csv'}. Next: pe-app train encoder --studies {studies / 'studies.csv'} ..."
    )
    if all(line.status == "failed" for line in lines):
        raise typer.Exit(1)


def show_terms(data_set: PublicSet, studies: Path) -> None:
    """What the makers of a set ask of whoever uses it: shown before its first import into a folder."""
    from pe_app.studies import read_studies

    listed = studies / "studies.csv"
    if listed.is_file() and any(study.source == data_set.name for study in read_studies(listed)):
        return
    known = data_set.terms
    typer.echo(f"{known.title}. Terms of use: {known.terms or 'not known; look them up before you publish a model'}.")
    typer.echo(f"Cite: {known.citation}.")
    typer.echo("The terms are written into the study list and into every model that learns from these studies.")


def show_estimate(estimate: Estimate) -> None:
    """What is left of an import, by its first study."""
    if estimate.studies:
        minutes = estimate.seconds / 60
        left = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(minutes, 1):.0f} minutes"
        typer.echo(
            f"{estimate.studies} more studies: about {left} and {estimate.nbytes / 1e9:.2f} GB, by the first one.",
            err=True,
        )


def show_lines(lines: Sequence[DatasetLine]) -> None:
    """What became of the studies: those left out one by one, the others in figures."""
    failed = [line for line in lines if line.status == "failed"]
    for line in failed[:FAILURES_SHOWN]:
        typer.echo(f"not imported: {line.study}: {line.reason}")
    if len(failed) > FAILURES_SHOWN:
        typer.echo(f"... and {len(failed) - FAILURES_SHOWN} more that were not imported")
    done = [line for line in lines if line.status != "failed"]
    counts = {label: sum(line.label == label for line in done) for label in ("positive", "negative", "uncertain")}
    words = ", ".join(f"{count} {label}" for label, count in counts.items() if count)
    reviewed, embolism = sum(line.reviewed for line in done), sum(line.embolism for line in done)
    known = sum(line.status == "known" for line in done)
    typer.echo(
        f"{len(done)} studies ({words or 'no label known'}; {known} unchanged since an earlier import), {reviewed} "
        f"reviewed slices, {embolism} of them with embolism; {len(failed)} studies not imported."
    )
