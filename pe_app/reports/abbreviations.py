"""PE stands for pleural effusion, physical examination or pre-eclampsia where a report defines it so."""

from __future__ import annotations

import re

_MARK = "\u2060"
"""An invisible character inside an abbreviation keeps the rules from reading it; ``as_written`` takes it out."""

_DEFINED = re.compile(r"(?P<words>(?:[A-Za-z]+[- ]+){1,4}?)\((?P<mark>PE)s?\)")
_EXPLAINED = re.compile(r"\bPEs?\b ?(?:\(|=|stands for |means )\s?(?P<words>p[a-z]+[- ]?e[a-z]+)", re.IGNORECASE)
_PE = re.compile(r"\bP(?=Es?\b)")


def hide_other_meanings(text: str) -> str:
    """The text with ``PE`` made unreadable for the rules where it is defined as something else than embolism.

    Everywhere, unless the same text defines it as embolism, too: then only where something else is defined.
    """
    meanings = [
        (match, _is_embolism(match["words"])) for match in (*_DEFINED.finditer(text), *_EXPLAINED.finditer(text))
    ]
    others = [match for match, embolism in meanings if embolism is False]
    if not others:
        return text
    if not any(embolism for _, embolism in meanings):
        return _PE.sub(f"P{_MARK}", text)
    for match in sorted(others, key=lambda match: -match.start()):
        text = text[: match.start()] + _PE.sub(f"P{_MARK}", match.group()) + text[match.end() :]
    return text


def as_written(text: str) -> str:
    """A text without the marks of ``hide_other_meanings``."""
    return text.replace(_MARK, "")


def _is_embolism(words: str) -> bool | None:
    """Whether the words that PE stands for speak of embolism; None where they do not have its initials."""
    parts = re.split(r"[- ]+", words.lower().strip(" -"))
    if any("embol" in part for part in parts[-3:]):
        return True
    initials = "".join(part[0] for part in parts[-2:])
    preclampsia = parts[-1].startswith(("preeclamp", "poly"))
    return False if initials == "pe" or preclampsia else None
