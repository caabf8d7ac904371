"""Nouns as JSON: read with the place of whatever is wrong, written with finite numbers only, and described for others.

A noun is a frozen dataclass. Its JSON names the schema that it follows, ``pe-detection/2`` or ``pe-detection/2.1``:
what a newer minor version adds is ignored, a newer major version is refused. The schemas of docs/schemas are made here.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pe_app.common.errors import InputError

Noun = TypeVar("Noun")

SIGNIFICANT_DIGITS = 6
"""Of floats that are written: more than any of our numbers means."""

_WORDS = {
    "missing": "is missing",
    "dataclass_type": "must be a JSON object",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
}


class Schema(Generic[Noun]):
    """One noun's JSON."""

    def __init__(
        self,
        kind: type[Noun],
        name: str,
        version: int,
        *,
        oldest: int | None = None,
        left_out: Sequence[str] = (),
        nested: Mapping[str, Schema[object]] | None = None,
        derived: Mapping[str, str | list[str]] | None = None,
    ) -> None:
        """Describe it.

        Args:
            kind: a dataclass.
            name: of the schema, e.g. ``pe-detection``; without ``pe-`` it names the noun in messages.
            version: the major version that is written.
            oldest: the oldest one that is still read; fields that it lacks need a default.
            left_out: fields that are not part of the JSON and have a default.
            nested: fields that hold another noun with a schema of its own, or None.
            derived: properties of the noun that are written too and ignored when read, with JSON Schema's types.
        """
        self.kind = kind
        self.name = name
        self.version = version
        self._oldest = version if oldest is None else oldest
        self._left_out = frozenset(left_out)
        self._nested = nested or {}
        self._derived = derived or {}

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    @property
    def file_name(self) -> str:
        """Of its JSON Schema: ``pe-detection-2.json``."""
        return f"{self.name}-{self.version}.json"

    @property
    def noun(self) -> str:
        """What messages call it."""
        return self.name.removeprefix("pe-")

    def read(self, payload: object) -> Noun:
        """The noun that decoded JSON holds.

        Raises:
            InputError: naming the first value that is not as it must be, and its place.
        """
        try:
            self.check_version(payload)
            known = {key: value for key, value in payload.items() if key not in self._left_out}  # type: ignore[attr-defined]
            for name, schema in self._nested.items():
                if known.get(name) is not None:
                    schema.check_version(known[name])
            return read_as(self._adapter, known)
        except InputError as error:
            raise InputError(f"{self.noun}: {error}") from None

    def write(self, noun: Noun) -> dict[str, object]:
        """A noun as plain JSON.

        Raises:
            ValueError: if a number is not finite; a result with such a number must not leave the program.
        """
        payload: dict[str, object] = {"schema": str(self)}
        for field in fields(noun):  # type: ignore[arg-type]
            if field.name not in self._left_out:
                value, schema = getattr(noun, field.name), self._nested.get(field.name)
                payload[field.name] = (
                    plain(value, self.noun) if schema is None or value is None else schema.write(value)
                )
        return {**payload, **{name: plain(getattr(noun, name), name) for name in self._derived}}

    def check_version(self, payload: object) -> None:
        """Whether this program reads a payload's version.

        Raises:
            InputError: if it does not, or the payload is no object.
        """
        if not isinstance(payload, Mapping):
            raise InputError(f"must be a JSON object, got {reprlib.repr(payload)}")
        found = payload.get("schema")
        match = re.fullmatch(rf"{self.name}/(\d{{1,4}})(\.\d{{1,4}})?", found) if isinstance(found, str) else None
        if match is None or int(match[1]) < self._oldest:
            raise InputError(f"unknown schema {reprlib.repr(found)}, expected {str(self)!r}")
        if int(match[1]) > self.version:
            raise InputError(f"schema {found!r} is newer than {str(self)!r}, which this program reads: update it")

    def described(self) -> dict[str, object]:
        """The JSON Schema (2020-12), with what the docstrings tell of every field."""
        content = self._adapter.json_schema()
        definitions = content.pop("$defs", {})
        for part in (content, *definitions.values()):
            _describe(part)
        for name in self._left_out:
            content["properties"].pop(name, None)
        for name, schema in self._nested.items():
            content["properties"][name]["anyOf"] = [{"$ref": schema.file_name}, {"type": "null"}]
        content["properties"] |= {name: {"type": kind, "readOnly": True} for name, kind in self._derived.items()}
        named = {"type": "string", "pattern": rf"^{self.name}/{self.version}(\.[0-9]{{1,4}})?$"}
        content["properties"] = {"schema": named, **content["properties"]}
        content["required"] = ["schema", *content.get("required", [])]
        head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": str(self)}
        used = {
            name: part for name, part in definitions.items() if f"#/$defs/{name}" in json.dumps([content, definitions])
        }
        return {**head, **{key: value for key, value in content.items() if key != "title"}, "$defs": used}

    @cached_property
    def _adapter(self) -> TypeAdapter[Noun]:
        return TypeAdapter(self.kind)


def read_as(adapter: TypeAdapter[Noun], payload: object) -> Noun:
    """Decoded JSON as a noun: no text is taken for a number, no number for yes or no; unknown fields are ignored.

    Raises:
        InputError: naming the first value that is not as it must be, and its place.
    """
    _check_values(payload)
    try:
        return adapter.validate_json(json.dumps(payload), strict=True)
    except ValidationError as error:
        raise InputError(_sentence(error)) from None


def json_text(payload: object, indent: int | None = None) -> str:
    """JSON that every reader takes: finite numbers only.

    Raises:
        ValueError: if a number is not finite.
    """
    return json.dumps(payload, ensure_ascii=False, allow_nan=False, indent=indent)


def plain(value: object, what: str = "value") -> object:
    """A value as JSON's own types: dataclasses as objects, tuples as lists, numpy's numbers as Python's.

    Floats are rounded to ``SIGNIFICANT_DIGITS``.

    Raises:
        ValueError: if a number is not finite.
    """
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name), field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, what) for entry in value]
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        raise ValueError(f"{what} holds a number that is not finite: {number}")
    return float(f"{number:.{SIGNIFICANT_DIGITS}g}")


def _check_values(payload: object, place: tuple[int | str, ...] = ()) -> None:
    if isinstance(payload, float) and not math.isfinite(payload):
        raise InputError(f"{_where(place)} must be a finite number, got {payload}")
    if isinstance(payload, str) and re.search("[\ud800-\udfff]", payload):  # halves of a letter, of no alphabet
        raise InputError(f"{_where(place)} must be printable text, got {reprlib.repr(payload)}")
    steps = payload.items() if isinstance(payload, Mapping) else enumerate(payload) if isinstance(payload, list) else ()
    for step, entry in steps:
        _check_values(entry, (*place, step))


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong: where, what, and the value."""
    first = error.errors(include_url=False)[0]
    where = _where(first["loc"])
    if first["type"] == "value_error":
        return ": ".join(filter(None, (where, str(first["ctx"]["error"]))))
    words = _WORDS.get(first["type"]) or re.sub(r"^\w+ should", "must", first["msg"])
    got = "" if first["type"] == "missing" else f", got {reprlib.repr(first['input'])}"
    return f"{where} {words}{got}".strip()


def _where(steps: Sequence[int | str]) -> str:
    """``("slices", 1, "z_mm")`` -> ``entry 2 of slices: z_mm``."""
    place = ""
    for step in steps:
        if isinstance(step, int):
            place = f"entry {step + 1} of {place}"
        else:
            place += (": " if place.startswith("entry") else "." if place else "") + step
    return place


def _describe(part: dict[str, object]) -> None:
    """Turn a docstring's section ``Attributes`` into descriptions of the fields; titles only repeat names."""
    part.pop("title", None)
    text, properties = part.get("description"), part.get("properties")
    if not isinstance(text, str) or not isinstance(properties, dict):
        return
    summary, _, listed = text.partition("\nAttributes:\n")
    part["description"] = " ".join(summary.split())
    for field in properties.values():
        field.pop("title", None)
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(listed.partition("\nRaises:")[0])):
        names, colon, words = entry.partition(":")
        for name in names.split(",") if colon else ():
            if name.strip() in properties:
                properties[name.strip()]["description"] = " ".join(words.split())
