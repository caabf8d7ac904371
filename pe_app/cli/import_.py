"""The verb that brings DICOM in: import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pe_app.cli.options import EXIT_INCOMPLETE, Accept, Limits, Refuse, progress_bars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pe_app.pacs.importing import ImportLine

ROWS_SHOWN = 200


def import_(
    sources: Annotated[list[Path], typer.Argument(help="DICOM folders, DICOMDIR, .zip or .tar(.gz) archives.")],
    studies: Annotated[Path, typer.Option(help="Folder of studies to make or extend; pe-app serve opens it.")],
    study_list: Annotated[
        Path | None, typer.Option("--list", help="Study list to make or extend.", show_default="STUDIES/studies.csv")
    ] = None,
    deidentify: Annotated[
        bool,
        typer.Option(
            "--deidentify", help="Pseudonyms instead of identifiers; no names, dates or paths in STUDIES. Needs --key."
        ),
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(
            help="Key of the pseudonyms, outside of STUDIES; made where missing. The "
            "table of patients is kept next to it."
        ),
    ] = None,
    names: Annotated[
        str, typer.Option(help="What studies are called after: accession (number), patient (and day) or hash.")
    ] = "hash",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="one per core, at most 4")
    ] = None,
    accept: Accept = None,
    refuse: Refuse = None,
    limits: Limits = None,
) -> None:
    """Convert the DICOM of many patients into a folder of studies, one series per study.

    A table reports what became of each series, and why it was skipped.
    """
    import os
    from typing import cast, get_args

    from pe_app.common.errors import InputError
    from pe_app.ct.quality import read_limits
    from pe_app.pacs.importing import ImportSettings, Names, Pseudonyms, import_studies, read_key

    if deidentify != (key is not None):
        raise InputError("--deidentify and --key FILE belong together: pseudonyms need a key, and nothing else does")
    if names not in get_args(Names):
        raise InputError(f"--names {names}: write {', '.join(get_args(Names))}")
    if deidentify and names != "hash":
        raise InputError(f"--names {names} would give patients away: leave it out with --deidentify")
    settings = ImportSettings(
        study_list,
        key,
        Pseudonyms(read_key(key, studies)) if key else None,
        workers or min(4, os.cpu_count() or 1),
        read_limits(limits, accept or (), refuse or ()),
        cast("Names", names),
    )
    with progress_bars() as progress:
        lines = import_studies(sources, studies, settings, progress)
    _show(lines)
    count = {status: sum(line.status == status for line in lines) for status in ("imported", "known", "failed")}
    unfit = sum(line.quality == "refused" and line.status == "imported" for line in lines)
    typer.echo(
        f"{count['imported']} studies imported ({unfit} of them unfit for detection), {count['known']} "
        f"unchanged, skipped, {count['failed']} failures, {len(lines) - sum(count.values())} series left out.\n"
        f"Study list: {study_list or studies / 'studies.csv'}. This table: {studies / 'import.csv'}. "
        f"Next: pe-app serve {studies}"
    )
    if not count["imported"] and not count["known"]:
        raise typer.Exit(1)
    if count["failed"]:
        raise typer.Exit(EXIT_INCOMPLETE)


def _show(lines: Sequence[ImportLine]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = 160
    table = Table(box=None, pad_edge=False)
    for heading in ("status", "study", "patient", "series", "slices", "quality", "reason"):
        table.add_column(heading, no_wrap=heading in ("status", "study", "slices", "quality"), overflow="fold")
    for line in lines[:ROWS_SHOWN]:
        name = line.description or line.series
        reason = f"{line.codes}: {line.reason}" if line.codes else line.reason
        cells = (line.status, line.study, line.patient, name, str(line.slices or ""), line.quality, reason)
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    if len(lines) > ROWS_SHOWN:
        typer.echo(f"... and {len(lines) - ROWS_SHOWN} lines more")
