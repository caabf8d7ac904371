"""The verb export-seg: a reader's outlines as DICOM SEG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import ArchiveUser, CaFile, PasswordFile, archive_access, progress_bars
from pe_app.cli.publishing import Send
from pe_app.common.extras import require_extra


def export_seg(
    study: Annotated[Path, typer.Argument(help="DICOM folder or imported .nrrd of the CT.")],
    annotation: Annotated[Path, typer.Argument(help="The .json of its reviewed slices, or Slicer's .seg.nrrd.")],
    out: Annotated[Path, typer.Option("--out", help="The .dcm to write.")],
    series: Annotated[str | None, typer.Option(help="Series Instance UID, where the folder holds several.")] = None,
    send: Send = "",
    user: ArchiveUser = "",
    password_file: PasswordFile = None,
    ca: CaFile = None,
) -> None:
    """A reader's outlines as DICOM SEG, in the study they belong to."""
    require_extra("dicom")
    from pe_app.annotation.sparse import SparseAnnotation
    from pe_app.ct.volume_io import read_volume
    from pe_app.pacs.dicomweb import Archive
    from pe_app.pacs.sending import send as send_files
    from pe_app.results.dicom import write_reader_segmentation

    access = archive_access(send, user, password_file, ca) if send else None
    volume = read_volume(study, series=series)
    path = write_reader_segmentation(SparseAnnotation.read(annotation, volume), volume, out)
    if path is None:
        typer.echo("No slice has an outline: no file was written.")
        return
    typer.echo(f"Written to {path}")
    if access is not None:
        with progress_bars() as progress:
            sent = send_files(Archive(access), [path], progress)
        typer.echo("The archive holds it already." if sent.known else f"Sent to {send}")
