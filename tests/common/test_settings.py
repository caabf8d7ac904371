"""Settings as flat lists of fields."""

import tomllib
from dataclasses import dataclass, field

import pytest

from pe_app.common.settings import as_toml, changed, documentation, flat


@dataclass(frozen=True)
class Inner:
    """Inside.

    Attributes:
        low: a number
            over two lines [ours].
    """

    low: float = 1.5

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ValueError("low is negative")


@dataclass(frozen=True)
class Outer:
    """Outside.

    Attributes:
        name: ``"a"`` or ``"b"``.
        inner: more.
        window: two numbers.
    """

    name: str = "a"
    inner: Inner = field(default_factory=Inner)
    window: tuple[float, float] = (-1024.0, 500.0)


def test_nested_settings_become_one_level_with_their_own_documentation():
    found = [(one.name, one.path, one.value, one.doc) for one in flat(Outer())]
    assert found == [
        ("name", ("name",), "a", "A or b."),
        ("low", ("inner", "low"), 1.5, "A number over two lines."),
        ("window", ("window",), (-1024.0, 500.0), "Two numbers."),
    ]


def test_a_subclass_keeps_the_documentation_of_its_base():
    @dataclass(frozen=True)
    class More(Outer):
        """More."""

    assert documentation(More)["name"] == "A or b."


def test_values_are_changed_at_any_depth_and_checked_there():
    assert changed(Outer(), {("inner", "low"): 2.0, ("name",): "b"}) == Outer("b", Inner(2.0))
    with pytest.raises(ValueError, match="negative"):
        changed(Outer(), {("inner", "low"): -1.0})


def test_the_toml_file_holds_what_a_toml_reader_finds_again():
    text = as_toml((Outer('quote " and é', Inner(1e-05)),), frozenset({"window"}))
    assert tomllib.loads(text) == {"name": 'quote " and é', "low": 1e-05}
