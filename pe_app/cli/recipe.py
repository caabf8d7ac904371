"""Recipes: from data to a model in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.options import progress_bars


def public(
    data: Annotated[Path, typer.Option(help="Folder with the downloads: fumpe, cadpe, read, rspect.")],
    out: Annotated[Path, typer.Option(help="Folder for everything that is made; the same call resumes there.")],
    settings_only: Annotated[
        bool, typer.Option("--settings-only", help="Write OUT/recipe.json and stop, so that it can be changed.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read studies.", show_default="one per core, at most 4")
    ] = None,
) -> None:
    """Public data to a trained and evaluated model: import, both stages, and the figures on held-out sets."""
    import os

    from pe_app.cli.import_dataset import show_estimate, show_lines, show_terms
    from pe_app.evaluation.report import summary
    from pe_app.research.public_recipe import make_public_model, read_recipe

    recipe = read_recipe(out)
    if settings_only:
        typer.echo(f"Settings: {out / 'recipe.json'}")
        return
    with progress_bars() as progress:
        judged = make_public_model(
            data,
            out,
            recipe,
            workers or min(4, os.cpu_count() or 1),
            progress,
            lambda data_set: show_terms(data_set, out / "studies"),
            show_lines,
            show_estimate,
        )
    typer.echo("\n".join(summary(judged)))
    typer.echo(f"Model: {out / 'model.safetensors'}. Open {out / 'evaluation' / 'index.html'}.")
