"""Verbs that exchange results with other programs: import-seg, export-seg, export-bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pe_app.cli.options import ArchiveUser, CaFile, Model, PasswordFile, archive_access, progress_bars
from pe_app.cli.others import served_annotations
from pe_app.common.errors import InputError

if TYPE_CHECKING:
    from pe_app.pacs.dicomweb import Access
    from pe_app.results.batch import Finished

Dicom = Annotated[bool, typer.Option("--dicom", help="Also write DICOM objects, for a PACS, into the folder dicom.")]
Send = Annotated[str, typer.Option("--send", metavar="URL", help="Send the objects to this DICOMweb archive, too; what "
                                   "it holds already is not sent again.")]  # fmt: skip


def dicom_publisher(dicom: bool, access: Access | None) -> Callable[[Finished], None] | None:
    """What ``detect`` does with a study whose files are written: DICOM objects into FOLDER/dicom, and to an archive."""
    if not dicom and access is None:
        return None
    from pe_app.pacs.dicomweb import Archive
    from pe_app.pacs.sending import send
    from pe_app.results.dicom import write_dicom_results

    archive = Archive(access) if access else None

    def publish(finished: Finished) -> None:
        files = write_dicom_results(finished.result, finished.volume, finished.folder / "dicom")
        if archive is not None:
            send(archive, files)

    return publish


def import_seg(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="DICOM segmentations.")],
    studies: Annotated[Path, typer.Option("--studies", help="Folder with studies.csv, as 'pe-app import' makes it.")],
    reviewed: Annotated[str, typer.Option(help="Which slices the reader looked at: segmented, range, all, or A-B "
                                               "(slice indices, 0 nearest the feet). A reviewed slice without an "
                                               "outline is 'none'.")],
    segment: Annotated[str, typer.Option(help="Number or label of the segment with the emboli, or all.")] = "",
    reader: Annotated[str, typer.Option(help="Who drew it. [default: the content creator in each file]")] = "",
) -> None:  # fmt: skip
    """Outlines drawn elsewhere (DICOM SEG) become annotations of the studies they were drawn on."""
    from pe_app.annotation.dicom_seg import Imported, import_segmentations, parse_reviewed

    def tell(imported: Imported) -> None:
        typer.echo(f"{imported.study}: {imported.embolism} slices with embolism, {imported.none} without: "
                   f"{imported.place}")  # fmt: skip

    slices = parse_reviewed(reviewed)
    served = served_annotations(studies) if (studies / ".pe" / "history").is_dir() else None
    problems = import_segmentations(files, studies, slices, segment, reader, served, tell)
    if problems:
        raise InputError("\n".join(f"left out: {problem}" for problem in problems))


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


def export_bundle(
    out: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    model: Model = None,
) -> None:
    """The model as a MONAI Bundle, which runs with 'python -m monai.bundle run'."""
    from pe_app.model.bundle import write_bundle
    from pe_app.model.detector import default_model

    chosen = model or default_model()
    if chosen is None:
        raise InputError("no model: give one with --model FILE")
    write_bundle(chosen, out)
    typer.echo(f"Bundle: {out}. See {out / 'docs' / 'README.md'}. Research use only, not for diagnosis.")
