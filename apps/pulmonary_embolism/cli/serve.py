"""The verb serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

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
)
from pe_app.common.extras import require_extra
from pe_monailabel.cli.tokens import DEFAULT_FILE


def serve(
    studies: Annotated[str, typer.Argument(help="Folder of .nrrd, .nii.gz or .nii studies; labels are kept in it. "
                                                "Or the address of an archive: https://pacs.example/dicom-web")],
    host: Annotated[str, typer.Option(help="An address of this machine; others than 127.0.0.1 need tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    model: Model = None,
    tokens: Annotated[Path | None, typer.Option(help="Token file (pe-app tokens add); asked for on 127.0.0.1, too. "
                                                     f"[default: {DEFAULT_FILE} where others are served]")] = None,
    certificate: Annotated[Path | None, typer.Option(help="Certificate (chain) in PEM, for https.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key in PEM, without a password.")] = None,
    plain_http: Annotated[bool, typer.Option("--plain-http", help="Serve other machines without https, where a proxy "
                                                                  "or the network encrypts.")] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="A name under which clients reach the server; may be "
                                                              "given several times.")] = None,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Largest upload, in MiB.")] = 1024,
    blinded: Annotated[bool, typer.Option("--blinded", help="Readers see no result of the model and nobody else's "
                                                            "label before they have submitted a study.")] = False,
    detection_minutes: Annotated[float, typer.Option(min=0.1, help="A detection that takes longer is stopped.")] = 10,
    cache: Annotated[Path | None, typer.Option(help="Of an archive: folder for fetched studies, and for labels and "
                                                    "models, which stay. [default: ./HOST-studies]")] = None,
    cache_gb: Annotated[float, typer.Option(min=1, help="Of an archive: keep so much of what was fetched; studies "
                                                        "with labels always stay.")] = 50,
    user: ArchiveUser = "",
    password_file: PasswordFile = None,
    ca: CaFile = None,
    patient: Patient = "",
    date: Date = "",
    description: Description = "",
) -> None:  # fmt: skip
    """The MONAI Label server for Slicer: detections, sparse annotations, active learning, training."""
    require_extra("server")
    from pe_monailabel.server.listen import Door
    from pe_monailabel.server.middleware import is_loopback

    if tokens is None and not is_loopback(host) and DEFAULT_FILE.is_file():
        tokens = DEFAULT_FILE
    door = Door(tokens, certificate, key, plain_http, tuple(allow_host or ()), max_upload_mb << 20)
    door.check(host)  # before torch is loaded
    from pe_monailabel import compat  # noqa: F401 - before monailabel

    # isort: split
    from pe_monailabel.server.serving import serve as serve_studies
    from pe_monailabel.store.archive import ArchiveSettings

    if "://" not in studies:
        serve_studies(Path(studies), host, port, model, door, 60 * detection_minutes, blinded=blinded)
        return
    access = archive_access(studies, user, password_file, ca)
    archive = ArchiveSettings(access, archive_query(patient, date, description), cache_gb)
    folder = cache or Path(f"{urlsplit(studies).hostname}-studies")
    serve_studies(folder, host, port, model, door, 60 * detection_minutes, archive, blinded=blinded)
