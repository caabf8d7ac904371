"""Pages from templates: every text is escaped, all share one style sheet, and nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import jinja2
from markupsafe import Markup

from pe_app.model.detection import NOTICE


def render(template: str, values: Mapping[str, object]) -> str:
    """A page: a template of ``templates/`` with these values."""
    return _environment().get_template(template).render(values)


def data_uri(content: bytes, kind: str = "image/jpeg") -> str:
    """A picture as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pe_app.results"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"included": _included, "script_hash": _script_hash, "notice": NOTICE}
    return environment


def _text(name: str) -> str:
    return (files("pe_app.results") / "templates" / name).read_text(encoding="utf-8")


def _included(name: str) -> Markup:
    """A style sheet or a script, as it is."""
    return Markup(_text(name))


def _script_hash(name: str) -> str:
    """The page's policy lets this one script run and no other, whatever a name might hold."""
    return base64.b64encode(hashlib.sha256(_text(name).encode()).digest()).decode()
