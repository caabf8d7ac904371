"""Settings dataclasses as flat lists of named fields: what the command line makes options of and a run folder keeps.

A setting that is itself a dataclass is replaced by its fields, so that ``--settings`` files have one level.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, TypeVar, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)

FLAT_NAMES = {("AttentionLoss", "kind"): "attention_kind", ("ClassifierConfig", "kind"): "classifier_kind"}
"""Fields that need another name where they stand among those of other settings."""


@dataclass(frozen=True)
class Setting:
    """One field of settings.

    Attributes:
        name: unique among the settings that are used together.
        path: names of the fields that lead to it.
        kind: its type.
        value: its value here.
        doc: its line of the class's docstring, as plain text.
    """

    name: str
    path: tuple[str, ...]
    kind: object
    value: object
    doc: str


def flat(settings: DataclassInstance, path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every field of the settings, in order; fields of nested settings in place of these."""
    cls = type(settings)
    kinds = get_type_hints(cls)
    documented = documentation(cls)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from flat(value, (*path, field.name))
        else:
            name = FLAT_NAMES.get((cls.__name__, field.name), field.name)
            yield Setting(name, (*path, field.name), kinds[field.name], value, documented.get(field.name, ""))


def changed(settings: T, values: Mapping[tuple[str, ...], object]) -> T:
    """The settings with other values at these paths; raises what the dataclasses raise for values out of range."""
    first: dict[str, object] = {path[0]: value for path, value in values.items() if len(path) == 1}
    for name in {path[0] for path in values if len(path) > 1}:
        inner = {path[1:]: value for path, value in values.items() if path[0] == name and len(path) > 1}
        first[name] = changed(getattr(settings, name), inner)
    return replace(settings, **first)


def documentation(cls: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of each attribute, without their markup."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        text = inspect.cleandoc(each.__doc__ or "")
        _, _, attributes = text.partition("Attributes:\n")
        for match in re.finditer(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
            found[match[1]] = _plain(match[2])
    return found


def as_toml(settings: Sequence[DataclassInstance], without: frozenset[str]) -> str:
    """All settings as a TOML file of one level, which ``pe-app train ... --settings`` reads.

    Args:
        settings: dataclasses that are used together.
        without: names that do not belong into the file.
    """
    lines = []
    for each in settings:
        lines.append(f"\n# {type(each).__name__}")
        # JSON's words for numbers, texts, truth and lists are TOML's, too
        lines += [f"{one.name} = {json.dumps(one.value)}" for one in flat(each) if one.name not in without]
    return "\n".join(lines).strip() + "\n"


def _plain(text: str) -> str:
    words = " ".join(text.split()).replace(" [ours]", "").replace("``", "").replace('"', "")
    return words[:1].upper() + words[1:]
