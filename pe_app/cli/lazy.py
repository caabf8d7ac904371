"""Groups of verbs whose modules import torch: loaded when one of them, or their help, is asked for."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from typing import ClassVar

import typer
from typer.core import TyperGroup


class LazyGroup(TyperGroup):
    """The verbs of a module's ``app``."""

    module: ClassVar[str]

    @cached_property
    def _loaded(self) -> TyperGroup:
        return typer.main.get_group(import_module(self.module).app)

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Their names."""
        return self._loaded.list_commands(ctx)

    def get_command(self, ctx: typer.Context, cmd_name: str):  # type: ignore[no-untyped-def, override]
        """One of them."""
        return self._loaded.get_command(ctx, cmd_name)


class TrainGroup(LazyGroup):
    """The verbs of train: their options are made from the settings they train with."""

    module = "pe_app.cli.train"
