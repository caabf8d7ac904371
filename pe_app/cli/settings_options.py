"""Options of a verb made from settings dataclasses, and the option --settings that reads them from a run's file.

A parameter of the verb whose default is settings becomes one option per field: named like the field, with its
type, default and line of documentation. The verb gets the dataclass back, filled in.
"""

from __future__ import annotations

import functools
import inspect
import tomllib
from collections.abc import Callable, Collection
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated

import typer

from pe_app.cli.machine import set_signature
from pe_app.common.errors import InputError
from pe_app.common.settings import Setting, changed, flat


def with_settings_options(skip: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameters of a verb that are settings by options.

    Args:
        skip: fields that the verb derives itself.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(verb, eval_str=True).parameters.values()
        settings = {parameter.name: parameter.default for parameter in parameters if is_dataclass(parameter.annotation)}
        options = {
            option.name: (owner, option)
            for owner, default in settings.items()
            for option in flat(default)
            if option.name not in skip
        }

        @functools.wraps(verb)
        def run(*, settings_file: Path | None, **values: object) -> None:
            given: dict[str, dict[tuple[str, ...], object]] = {owner: {} for owner in settings}
            for name, (owner, option) in options.items():
                given[owner][option.path] = values.pop(name)
            try:
                made = {owner: changed(default, given[owner]) for owner, default in settings.items()}
            except ValueError as error:
                raise InputError(f"settings: {error}") from error
            verb(**values, **made)

        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [parameter.replace(kind=keyword) for parameter in parameters if parameter.name not in settings]
        made = [_as_parameter(option, type(settings[owner]).__name__) for owner, option in options.values()]
        known = frozenset({*(parameter.name for parameter in own), *options})
        set_signature(run, [*own, _settings_file(known), *made])
        return run

    return decorate


_PANELS = {
    "EncoderTraining": "Training",
    "ClassifierTraining": "Training",
    "FineTuning": "Training",
    "SlabConfig": "Slabs",
    "EncoderConfig": "Network of stage I",
    "ClassifierConfig": "Network of stage II",
}


def _as_parameter(option: Setting, owner: str) -> inspect.Parameter:
    name = "--" + option.name.replace("_", "-")
    if isinstance(option.value, bool) and option.value:
        name = f"{name}/--no-{name[2:]}"
    declared = typer.Option(name, help=option.doc, rich_help_panel=_PANELS.get(owner, owner))
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=option.value,
        annotation=Annotated[option.kind, declared],
    )


def _settings_file(known: frozenset[str]) -> inspect.Parameter:
    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            context.default_map = {**(context.default_map or {}), **_values(path, known)}
        return path

    declared = typer.Option(
        "--settings",
        is_eager=True,
        callback=read,
        help="Settings of an earlier run: settings.toml of its run folder. Options on the command line win.",
    )
    return inspect.Parameter(
        "settings_file",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Path | None, declared],
    )


def _values(path: Path, known: frozenset[str]) -> dict[str, object]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--settings {path}: cannot be read ({error})") from error
    if unknown := sorted(values.keys() - known):
        raise InputError(f"--settings {path}: {unknown[0]} is not an option of this command: remove it from the file")
    return values
