"""The options --dicom and --send: what happens to a study whose files are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from pe_app.common.extras import require_extra

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
    require_extra("dicom")
    from pe_app.pacs.dicomweb import Archive
    from pe_app.pacs.sending import send
    from pe_app.results.dicom import write_dicom_results

    archive = Archive(access) if access else None

    def publish(finished: Finished) -> None:
        files = write_dicom_results(finished.result, finished.volume, finished.folder / "dicom")
        if archive is not None:
            send(archive, files)

    return publish
