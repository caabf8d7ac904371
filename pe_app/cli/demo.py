"""The verb demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import Model, progress_bars
from pe_app.common.extras import require_extra


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the two studies and their pages.")] = Path("demo"),
    model: Model = None,
) -> None:
    """Two phantom studies, the real server, both detections with their pages."""
    require_extra("server")
    from pe_app.research.demo import run_demo, summary

    with progress_bars() as progress:
        studies = run_demo(out, model, progress)
    for study in studies:
        typer.echo("\n".join(summary(study)))
    typer.echo(f"Open {out / 'index.html'}. Simulated studies; research use only, not for diagnosis.")
