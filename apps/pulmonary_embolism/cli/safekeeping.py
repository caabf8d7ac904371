"""Verbs that keep labels safe: backup, restore, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pe_app.common.errors import InputError
from pe_monailabel.cli.folder import StudiesFolder, open_store

EXIT_DAMAGED = 1


def backup(
    studies: StudiesFolder,
    out: Annotated[Path, typer.Option("--out", help="The .tar to write.", show_default=False)],
) -> None:
    """Copy all labels with their history, and all models, into one file; CTs are not in it. The server may run."""
    from pe_monailabel.store.backup import back_up

    count = back_up(open_store(studies), out)
    typer.echo(f"{count} files in {out}")


def restore(
    studies: StudiesFolder,
    file: Annotated[Path, typer.Argument(metavar="BACKUP", help="A .tar of pe-app backup.", show_default=False)],
) -> None:
    """Bring back from a backup what is missing or damaged. Nothing newer is replaced; stop the server before."""
    from pe_monailabel.server.possession import holder_of
    from pe_monailabel.store.backup import restore as bring_back

    if not studies.is_dir():
        raise InputError(f"{studies}: there is no such folder")
    if holder := holder_of(studies / ".pe"):
        raise InputError(f"{studies}: is served by {holder}: stop that server first")
    restored = bring_back(file, studies.resolve())
    typer.echo(f"{restored.files} files brought back")
    for line in restored.kept:
        typer.echo(f"left as it is: {line} (pe-app labels restore lets another version count)")


def check(studies: StudiesFolder) -> None:
    """List what is damaged in a folder that is served and what it would cost; changes nothing. Exit code 1 if any."""
    from pe_monailabel.store.damage import find_damage

    if not studies.is_dir():
        raise InputError(f"{studies}: there is no such folder")
    found = list(find_damage(studies.resolve()))
    for line in found:
        typer.echo(line)
    if found:
        raise typer.Exit(EXIT_DAMAGED)
    typer.echo("Nothing is damaged.")
