"""Nouns as JSON: what is refused and where, what newer versions may bring, and that only finite numbers leave."""

import json
import math
from dataclasses import dataclass

import jsonschema
import pytest

from pe_app.common.errors import InputError
from pe_app.common.schema import Schema, json_text, plain


@dataclass(frozen=True)
class Wheel:
    """One wheel.

    Attributes:
        place, side: where it is.
        width_mm: of the tyre,
            in millimetres.
    """

    place: str
    side: str
    width_mm: float


@dataclass(frozen=True)
class Cart:
    """What is drawn."""

    wheels: tuple[Wheel, ...]
    sold: bool = False
    known: bool = False

    @property
    def count(self) -> int:
        return len(self.wheels)


CART = Schema(Cart, "pe-cart", 3, oldest=2, left_out=("known",), derived={"count": "integer"})
CARTS = {"schema": "pe-cart/3", "wheels": [{"place": "front", "side": "left", "width_mm": 20}], "sold": True}


def changed(*place, to):
    payload = json.loads(json.dumps(CARTS))
    *way, last = place
    part = payload
    for step in way:
        part = part[step]
    part[last] = to
    return payload


def test_what_was_written_is_read_again():
    cart = Cart((Wheel("front", "left", 20.5),), sold=True, known=True)
    payload = json.loads(json_text(CART.write(cart)))
    assert payload == {**CARTS, "wheels": [{"place": "front", "side": "left", "width_mm": 20.5}], "count": 1}
    assert CART.read(payload) == Cart((Wheel("front", "left", 20.5),), sold=True)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([], r"^cart: must be a JSON object, got \[\]$"),
        (changed("schema", to="pe-cart/1"), "cart: unknown schema 'pe-cart/1', expected 'pe-cart/3'"),
        (changed("schema", to="pe-wheel/3"), "unknown schema"),
        (changed("schema", to=3), "unknown schema 3"),
        (changed("schema", to="pe-cart/4"), "'pe-cart/4' is newer than 'pe-cart/3', which this program reads: update"),
        (changed("schema", to="pe-cart/4.1"), "newer"),
        (changed("sold", to="no"), "sold must be a valid boolean, got 'no'"),
        (changed("sold", to=1), "sold must be a valid boolean, got 1"),
        (changed("wheels", 0, "width_mm", to="wide"), "entry 1 of wheels: width_mm must be a valid number, got 'wide'"),
        (changed("wheels", 0, "width_mm", to="20"), "width_mm must be a valid number"),
        (changed("wheels", 0, "width_mm", to=math.nan), "entry 1 of wheels: width_mm must be a finite number, got nan"),
        (changed("wheels", 0, to=None), "entry 1 of wheels must be a JSON object"),
        (changed("wheels", to=[{"place": "front", "side": "left"}]), "entry 1 of wheels: width_mm is missing"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(payload, message):
    with pytest.raises(InputError, match=message):
        CART.read(payload)


def test_what_a_newer_minor_version_adds_is_ignored_and_an_older_major_version_is_read():
    assert CART.read({**CARTS, "schema": "pe-cart/3.7", "colour": "red"}).sold
    assert CART.read({"schema": "pe-cart/2", "wheels": []}) == Cart(())
    assert not CART.read({**CARTS, "known": True}).known


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_never_leaves(number):
    with pytest.raises(ValueError, match="width_mm holds a number that is not finite"):
        CART.write(Cart((Wheel("front", "left", number),)))
    with pytest.raises(ValueError, match="not finite"):
        plain([{"a": number}])
    with pytest.raises(ValueError, match="JSON compliant"):
        json_text([number])


def test_the_described_schema_agrees_with_what_is_read():
    described = CART.described()
    assert described["$defs"]["Wheel"]["properties"]["width_mm"]["description"] == "of the tyre, in millimetres."
    assert "known" not in described["properties"]
    judge = jsonschema.Draft7Validator(described)
    judge.check_schema(described)
    assert judge.is_valid(CARTS)
    for wrong in (changed("sold", to="no"), changed("schema", to="pe-cart/4"), changed("wheels", 0, to={})):
        assert not judge.is_valid(wrong)
