"""Verbs on the models of a folder of studies, also while a server serves it: models list, add, pin, unpin, rollback."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_monailabel.cli.folder import StudiesFolder, open_models

ModelName = Annotated[str, typer.Argument(metavar="[MODEL]", help="Version, or first characters of the SHA-256.")]

app = typer.Typer(no_args_is_help=True, help="The models that were published in a folder that is served.")


@app.command("list")
def list_models(studies: StudiesFolder) -> None:
    """The models that were published in a folder; * is served."""
    models = open_models(studies)
    pinned = models.serving().pinned
    for entry in models.kept():
        model = entry.model
        marks = ("*" if entry.served else " ") + (" pinned" if entry.served and pinned else "")
        trained = "" if model.trained else "  not fully trained"
        typer.echo(f"{model.sha256[:12]}  {model.name} {model.version}  kept {entry.kept}{trained} {marks}".rstrip())
    if not models.serving().models:
        typer.echo("No model was published here yet: the server serves the one that it was started with.")


@app.command("add")
def add_model(
    studies: StudiesFolder, model: Annotated[Path, typer.Argument(help="A .safetensors file of pe-app train.")]
) -> None:
    """Keep a model that was trained elsewhere, and serve it unless another one is pinned."""
    identity = open_models(studies).publish(model).identity
    typer.echo(f"{identity.sha256[:12]}  {identity.name} {identity.version} is kept")


@app.command("pin")
def pin_model(studies: StudiesFolder, model: ModelName = "") -> None:
    """Serve a kept model, also when others are published; by default the one that is served now."""
    entry = open_models(studies).pin(model)
    typer.echo(f"{entry.model.sha256[:12]}  {entry.model.name} {entry.model.version} is served and stays")


@app.command("unpin")
def unpin_model(studies: StudiesFolder) -> None:
    """Let the next model that is published be served."""
    open_models(studies).unpin()
    typer.echo("The next model that is published is served.")


@app.command("rollback")
def rollback_model(studies: StudiesFolder) -> None:
    """Serve the model that was served before."""
    entry = open_models(studies).rollback()
    typer.echo(f"{entry.model.sha256[:12]}  {entry.model.name} {entry.model.version} is served again")
