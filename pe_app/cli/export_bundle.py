"""The verb export-bundle: the model as a MONAI Bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import Model
from pe_app.common.errors import InputError


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
