"""The phrases of ``rules/*.toml``, compiled once."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import NamedTuple

TARGET = "(?:PE|DEFECT|THROMBUS)"
TOKENS = {
    "material": "OTHER MATERIAL",
    "other": "OTHER",
    "chronic_embolism": "chronic PE",
    "embolism": "PE",
    "defect": "DEFECT",
    "chronic_thrombus": "chronic WEB THROMBUS",
    "thrombus": "THROMBUS",
}
"""What the mentions of ``targets.toml`` are replaced by before modifiers are looked for."""


class Modifier(NamedTuple):
    """One entry of ``modifiers.toml``; reach in words, 0 for the whole clause."""

    kind: str
    direction: str
    reach: int


def word_lists(name: str) -> dict[str, list[str]]:
    """Lists of words or patterns of a rule file, by their names."""
    lists: dict[str, list[str]] = tomllib.loads(_rule_file(name))
    return lists


def _rule_file(name: str) -> str:
    return (files("pe_app.reports") / "rules" / name).read_text("utf-8")


def any_of(groups: Mapping[str, Sequence[str]]) -> str:
    """One alternative of all patterns, named by their group, each on whole words.

    Patterns that start with a letter share one test for the start of a word: most places of a text fail it at once.
    """
    words, others = [], []
    for name, patterns in groups.items():
        whole = [
            f"(?:{pattern.replace('TARGET', TARGET)})" + ("" if pattern.endswith(("\\?", "$")) else "(?!\\w)")
            for pattern in patterns
        ]
        plain = [w for w, pattern in zip(whole, patterns, strict=True) if _STARTS_A_WORD.match(pattern)]
        rest = [w for w, pattern in zip(whole, patterns, strict=True) if not _STARTS_A_WORD.match(pattern)]
        words += [f"(?P<{name}>{'|'.join(plain)})"] if plain else []
        others += [f"(?P<{name}_>{'|'.join(rest)})"] if rest else []
    return "|".join([f"(?<!\\w)(?:{'|'.join(words)})"] * bool(words) + others)


_STARTS_A_WORD = re.compile(r"(?:\\b|\(\?:|\()*[A-Za-z]")


def group_of(match: re.Match[str]) -> str:
    """The name of the group of ``any_of`` that matched."""
    return str(match.lastgroup).rstrip("_")


def _compiled(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile(any_of({"found": patterns}))


class Rules:
    """All rule files, compiled once."""

    def __init__(self) -> None:
        targets = word_lists("targets.toml")
        statements = word_lists("statements.toml")
        sections = word_lists("sections.toml")
        spelling: dict[str, str] = tomllib.loads(_rule_file("spelling.toml"))
        places: dict[str, dict[str, list[str]]] = tomllib.loads(_rule_file("places.toml"))
        entries = tomllib.loads(_rule_file("modifiers.toml"))["modifier"]
        self.spelling = re.compile("|".join(f"({pattern})" for pattern in spelling))
        self.spelled = tuple(spelling.values())
        self.targets = re.compile(any_of({kind: targets[kind] for kind in TOKENS}))
        self.pulmonary = _compiled(targets["pulmonary_context"])
        self.other_vessel = _compiled(targets["other_context"])
        self.other_finding = _compiled(targets["other_findings"])
        self.modifiers = re.compile(any_of({f"m{k}": e["patterns"] for k, e in enumerate(entries)}))
        self.entries = {f"m{k}": Modifier(e["kind"], e["direction"], e.get("reach", 0)) for k, e in enumerate(entries)}
        self.boundaries = re.compile("|".join(p.replace("TARGET", TARGET) for p in statements["boundaries"]))
        self.causes = _compiled(statements["causes"])
        self.smaller = _compiled(statements["smaller"])
        self.clear = _compiled(statements["clear"])
        self.clear_chest = _compiled(statements["clear_chest"])
        self.not_diagnostic = _compiled(statements["not_diagnostic"])
        self.elsewhere = _compiled(statements["not_diagnostic_elsewhere"])
        self.smaller_unseen = _compiled(statements["smaller_unseen"])
        self.continues = _compiled(statements["continues"])
        self.corrected = _compiled(statements["corrected"])
        self.locations = {name: re.compile("|".join(patterns)) for name, patterns in places["location"].items()}
        self.sides = {name: re.compile("|".join(patterns)) for name, patterns in places["side"].items()}
        self.abbreviations = re.compile("\\W*(?:" + "|".join(sections.pop("abbreviations")) + ")", re.IGNORECASE)
        heads = "|".join(f"(?P<{{0}}_{kind}>{'|'.join(sections[kind])})" for kind in sections)
        decorated = r"[ \t>*#_=\[\]-]*"
        self.heading = re.compile(
            rf"^{decorated}(?:\d[.)] )?(?:{heads.replace('{0}', 'line')}){decorated}(?:\([^)\n]{{0,40}}\))?{decorated}"
            rf"(?::+|#\d:?|[ \t]+colon\b|[ \t]+-+[ \t]|\.?{decorated}$)"
            rf"|[ \t](?:(?<=[.;:?!)\]]\s)|(?<=\s\s)|(?-i:(?=[A-Z /]+:)))(?:{heads.replace('{0}', 'text')})[ \t]*:",
            re.IGNORECASE | re.MULTILINE,
        )


RULES = Rules()
