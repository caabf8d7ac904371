"""The verb import-seg: outlines drawn elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.others import served_annotations
from pe_app.common.errors import InputError


def import_seg(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="DICOM segmentations.")],
    studies: Annotated[Path, typer.Option("--studies", help="Folder with studies.csv, as 'pe-app import' makes it.")],
    reviewed: Annotated[str, typer.Option(help="Which slices the reader looked at: segmented, range, all, or A-B "
                                               "(slice indices, 0 nearest the feet). A reviewed slice without an "
                                               "outline is 'none'.")],
    segment: Annotated[str, typer.Option(help="Number or label of the segment with the emboli, or all.")] = "",
    reader: Annotated[str, typer.Option(help="Who drew it.", show_default="the content creator in each file")] = "",
) -> None:  # fmt: skip
    """Outlines drawn elsewhere (DICOM SEG) become annotations of the studies they were drawn on."""
    from pe_app.annotation.dicom_seg import Imported, import_segmentations, parse_reviewed

    def show(imported: Imported) -> None:
        typer.echo(f"{imported.study}: {imported.embolism} slices with embolism, {imported.none} without: "
                   f"{imported.place}")  # fmt: skip

    slices = parse_reviewed(reviewed)
    served = served_annotations(studies) if (studies / ".pe" / "history").is_dir() else None
    problems = import_segmentations(files, studies, slices, segment, reader, served, show)
    if problems:
        raise InputError("\n".join(f"left out: {problem}" for problem in problems))
