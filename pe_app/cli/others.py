"""What other packages bring to the command line, found by entry points: the server's verbs and its annotations.

pe_app.commands             Typer apps whose verbs are pe-app's, too; loaded when one is asked for, or for --help
pe_app.served_annotations   what opens the annotations of a folder that is served, given the folder
"""

from __future__ import annotations

from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer.core import TyperGroup

from pe_app.common.errors import InputError

if TYPE_CHECKING:
    from pe_app.annotation.dicom_seg import Annotations


class VerbsOfOthers(TyperGroup):
    """Our verbs, and after them those of other packages."""

    @cached_property
    def _others(self) -> tuple[TyperGroup, ...]:
        found = sorted(entry_points(group="pe_app.commands"), key=lambda entry: entry.name)
        return tuple(typer.main.get_group(entry.load()) for entry in found)

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Names of all verbs, ours first."""
        return [*super().list_commands(ctx), *(name for group in self._others for name in group.list_commands(ctx))]

    def get_command(self, ctx: typer.Context, cmd_name: str):  # type: ignore[no-untyped-def, override]
        """A verb by its name; ours where two have the same."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        return next((verb for group in self._others if (verb := group.get_command(ctx, cmd_name))), None)


def served_annotations(studies: Path) -> Annotations:
    """The annotations of a folder that is or was served: new ones are versions in its history.

    Raises:
        InputError: if no server is installed.
    """
    found = tuple(entry_points(group="pe_app.served_annotations"))
    if not found:
        raise InputError(
            f"{studies}: this folder is served, and its annotations belong to the server: pip install 'pe-app[server]'"
        )
    annotations: Annotations = found[0].load()(studies)
    return annotations
