"""Verbs on the labels of a folder of studies, also while a server serves it: labels list, show, restore."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from pe_app.common.errors import InputError
from pe_monailabel.cli.folder import CLIENT, StudiesFolder, open_store
from pe_monailabel.store.checks import printable

StudyId = Annotated[str, typer.Argument(metavar="STUDY", help="As the server calls it.", show_default=False)]
Revision = Annotated[str, typer.Argument(help="As labels list shows it.", show_default=False)]

app = typer.Typer(no_args_is_help=True, help="Every version of the labels of a folder that is served.")


@app.command("list")
def list_labels(
    studies: StudiesFolder,
    study: Annotated[str, typer.Argument(metavar="[STUDY]", help="One study; all that have labels by default.")] = "",
) -> None:
    """Every save of the studies' labels, the latest first: who, when, with what program, after which model."""
    store = open_store(studies)
    for image_id in [study] if study else store.list_images():
        for entry in store.versions(image_id):
            typer.echo(f"{image_id}  {_line(entry)}")


@app.command("show")
def show_label(
    studies: StudiesFolder,
    study: StudyId,
    revision: Revision,
    out: Annotated[Path | None, typer.Option(help="Folder for a copy of its label file.")] = None,
) -> None:
    """The contents of one save; of an annotation slice by slice."""
    entry, file = open_store(studies).version(study, revision)
    typer.echo(f"{study}  {_line(entry)}")
    for reviewed in entry.get("annotation", {}).get("slices", ()):
        place = f"slice {reviewed['slice_index']} (z {reviewed['z_mm']:.1f} mm)"
        typer.echo(printable(f"  {place}: {reviewed['state']} {reviewed['reader']}"))
    if out is not None:
        if file is None:
            raise InputError(f"version {revision} of study {study} has no label file")
        out.mkdir(parents=True, exist_ok=True)
        target = out / f"{study}-{file.name}"
        shutil.copyfile(file, target)
        typer.echo(f"Written to {target}")


@app.command("agreement")
def agreement(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDIES...", help="Folders that are served: one where "
                                                  "several readers read, or one for each reader, with the same "
                                                  "studies.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Page of HTML with the same table.")] = None,
) -> None:  # fmt: skip
    """How readers agree: kappa of study labels and of slices, overlap of outlines, for every pair of readers."""
    stores = [open_store(folder) for folder in studies]
    from pe_app.common.files import write_durably
    from pe_app.evaluation.agreement import COLUMNS, agreement_cells, agreement_page, compare_readers
    from pe_monailabel.store.reads import reads_of

    pairs = compare_readers(read for store in stores for read in reads_of(store))
    if not pairs:
        raise InputError("no two readers have read the same study here; there is nothing to compare")
    for row in [COLUMNS, *(agreement_cells(pair) for pair in pairs)]:
        typer.echo("  ".join(f"{word:>13}" if place else f"{word:<24}" for place, word in enumerate(row)))
    if out is not None:
        write_durably(out, agreement_page(pairs))


@app.command("restore")
def restore_label(
    studies: StudiesFolder,
    study: StudyId,
    revision: Revision,
    reader: Annotated[str, typer.Option(help="Who restores it; recorded with the new version.")],
) -> None:
    """Let an earlier save count again, as a new version; none is rewritten."""
    entry = open_store(studies).restore(study, revision, {"reader": reader, "client": CLIENT})
    typer.echo(f"{study}  {_line(entry)}")


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
    return printable(f"{entry['revision']}  {entry['time']}  {entry['kind']} {what}  {slices}  {said}{current}")
