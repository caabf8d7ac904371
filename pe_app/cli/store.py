"""Verbs on a folder of studies, also while a server serves it: labels list, show, restore; models list, pin, ..."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pe_app.common.errors import InputError

if TYPE_CHECKING:
    from pe_monailabel.store.models import Models
    from pe_monailabel.store.studies import StudyStore

CLIENT = "pe-app"
"""How a save of the command line is recorded."""

Studies = Annotated[Path, typer.Argument(help="The folder that is served.", show_default=False)]
StudyId = Annotated[str, typer.Argument(metavar="STUDY", help="As the server calls it.", show_default=False)]
Revision = Annotated[str, typer.Argument(help="As labels list tells it.", show_default=False)]
ModelName = Annotated[str, typer.Argument(metavar="[MODEL]", help="Version, or first characters of the SHA-256.")]


def list_labels(
    studies: Studies,
    study: Annotated[str, typer.Argument(metavar="[STUDY]", help="One study; all that have labels by default.")] = "",
) -> None:
    """Every save of the studies' labels, the latest first: who, when, with what program, after which model."""
    store = open_store(studies)
    for image_id in [study] if study else store.list_images():
        for entry in store.versions(image_id):
            typer.echo(f"{image_id}  {_line(entry)}")


def show_label(
    studies: Studies,
    study: StudyId,
    revision: Revision,
    out: Annotated[Path | None, typer.Option(help="Folder for a copy of its label file.")] = None,
) -> None:
    """What one save said; of an annotation slice by slice."""
    entry, file = open_store(studies).version(study, revision)
    typer.echo(f"{study}  {_line(entry)}")
    for reviewed in entry.get("annotation", {}).get("slices", ()):
        typer.echo(
            f"  slice {reviewed['slice_index']} (z {reviewed['z_mm']:.1f} mm): {reviewed['state']} {reviewed['reader']}"
        )
    if out is not None:
        if file is None:
            raise InputError(f"version {revision} of study {study} has no label file")
        out.mkdir(parents=True, exist_ok=True)
        target = out / f"{study}-{file.name}"
        shutil.copyfile(file, target)
        typer.echo(f"Written to {target}")


def restore_label(
    studies: Studies,
    study: StudyId,
    revision: Revision,
    reader: Annotated[str, typer.Option(help="Who restores it; recorded with the new version.")],
) -> None:
    """Let an earlier save count again, as a new version; none is rewritten."""
    entry = open_store(studies).restore(study, revision, {"reader": reader, "client": CLIENT})
    typer.echo(f"{study}  {_line(entry)}")


def list_models(studies: Studies) -> None:
    """The models that were published in a folder; * is served."""
    models = _models(studies)
    pinned = models.serving().pinned
    for entry in models.kept():
        model = entry.model
        marks = ("*" if entry.served else " ") + (" pinned" if entry.served and pinned else "")
        trained = "" if model.trained else "  not fully trained"
        typer.echo(f"{model.sha256[:12]}  {model.name} {model.version}  kept {entry.kept}{trained} {marks}".rstrip())
    if not models.serving().models:
        typer.echo("No model was published here yet: the server serves the one that it was started with.")


def add_model(
    studies: Studies, model: Annotated[Path, typer.Argument(help="A .safetensors file of pe-app train.")]
) -> None:
    """Keep a model that was trained elsewhere, and serve it unless another one is pinned."""
    identity = _models(studies).publish(model).identity
    typer.echo(f"{identity.sha256[:12]}  {identity.name} {identity.version} is kept")


def pin_model(studies: Studies, model: ModelName = "") -> None:
    """Serve a kept model, also when others are published; by default the one that is served now."""
    entry = _models(studies).pin(model)
    typer.echo(f"{entry.model.sha256[:12]}  {entry.model.name} {entry.model.version} is served and stays")


def unpin_model(studies: Studies) -> None:
    """Let the next model that is published be served."""
    _models(studies).unpin()
    typer.echo("The next model that is published is served.")


def rollback_model(studies: Studies) -> None:
    """Serve the model that was served before."""
    entry = _models(studies).rollback()
    typer.echo(f"{entry.model.sha256[:12]}  {entry.model.name} {entry.model.version} is served again")


def _line(entry: dict[str, Any]) -> str:
    """A version in a line."""
    what = entry["label"] or entry["tag"]
    slices = ", ".join(f"{count} {state}" for state, count in (entry["slices"] or {}).items())
    model = entry["model_seen"] or {}
    seen = f"{model.get('name')} {model.get('version')}" if isinstance(model, dict) and model else ""
    words = {
        "by": entry["reader"],
        "with": entry["client"],
        "after": seen,
        "from": entry["restored_from"],
    }
    said = "  ".join(f"{word} {value}" for word, value in words.items() if value)
    current = "  *" if entry["current"] else ""
    return f"{entry['revision']}  {entry['time']}  {entry['kind']} {what}  {slices}  {said}{current}"


def _folder(studies: Path) -> Path:
    if not studies.is_dir():
        raise InputError(f"{studies}: there is no such folder")
    return studies.resolve()


def open_store(studies: Path) -> StudyStore:
    """The store of a folder, also while a server serves it."""
    folder = _folder(studies)
    from pe_monailabel import compat  # noqa: F401 - before monailabel
    from pe_monailabel.store.studies import StudyStore

    return StudyStore(folder)


def _models(studies: Path) -> Models:
    folder = _folder(studies)
    from pe_monailabel.store.models import Models

    return Models(folder / ".pe" / "models")
