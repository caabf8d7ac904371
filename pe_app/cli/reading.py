"""Verbs for one study after another: detect, serve, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import EXIT_REFUSED, Model, progress_bars
from pe_app.cli.tokens import DEFAULT_FILE


def detect(
    study: Annotated[Path, typer.Argument(help="DICOM folder, .nii, .nii.gz or .nrrd of one chest CT.")],
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Folder for detection.json, attention.nrrd, review.png, "
                                                  "index.html. [default: ./STUDY-detection]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the detection as JSON.")] = False,
    series: Annotated[str | None, typer.Option(help="Series Instance UID, where the folder holds several.")] = None,
    full_resolution: Annotated[bool, typer.Option(help="Also write the attention on the CT's grid.")] = False,
) -> None:  # fmt: skip
    """Probability of embolism of one study, with the evidence and where to look."""
    from pe_app.detector import Detector, default_model
    from pe_app.result_files import verdict, write_result
    from pe_app.volume_io import read_volume

    volume = read_volume(study, series=series)
    chosen = model or default_model()
    detector = Detector.load(chosen) if chosen else Detector.untrained()
    with progress_bars() as progress:
        result = detector.detect(volume, progress)
    name = study.resolve().name
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
            typer.echo(
                f"  look at slice {candidate.slice_index} (z {candidate.z_mm:.0f} mm), "
                f"slab probability {candidate.slab_probability:.2f}"
            )
        typer.echo(f"Written to {folder}. Research use only, not for diagnosis.")
    if detection.status == "refused":
        raise typer.Exit(EXIT_REFUSED)


def serve(
    studies: Annotated[Path, typer.Argument(help="Folder of .nrrd, .nii.gz or .nii studies; labels are kept in it.")],
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
    detection_minutes: Annotated[float, typer.Option(min=0.1, help="A detection that takes longer is stopped.")] = 10,
) -> None:  # fmt: skip
    """The MONAI Label server for Slicer: detections, sparse annotations, active learning, training."""
    import pe_monailabel  # noqa: F401 - puts the app's own modules on the path
    from lib.door import Door
    from lib.guard import is_loopback

    if tokens is None and not is_loopback(host) and DEFAULT_FILE.is_file():
        tokens = DEFAULT_FILE
    door = Door(tokens, certificate, key, plain_http, tuple(allow_host or ()), max_upload_mb << 20)
    door.check(host)  # before torch is loaded
    from lib.server import serve as serve_studies

    serve_studies(studies, host, port, model, door, 60 * detection_minutes)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the two studies and their pages.")] = Path("demo"),
    model: Model = None,
) -> None:
    """Two phantom studies, the real server, both detections with their pages."""
    from pe_app.demo import run_demo, summary

    with progress_bars() as progress:
        studies = run_demo(out, model, progress)
    for study in studies:
        typer.echo("\n".join(summary(study)))
    typer.echo(f"Open {out / 'index.html'}. Simulated studies; research use only, not for diagnosis.")
