"""The language of a report: rules for English read nothing right in another one, where words look alike."""

from __future__ import annotations

import re
from functools import lru_cache

from pe_app.reports.phrases import word_lists

READ = "English"
"""The language of the rules."""

OTHER_SCRIPT = "not in Latin script"

_WORD = re.compile(r"[^\W\d_]+")
_LONGEST_LOOK = 20_000
"""Characters that tell the language of any report."""


def other_language(text: str) -> str:
    """The name of a report's language where it is not the one of the rules, else empty.

    Another language is believed where more words are its own than English ones, and at least two are, or one that
    names the disease: a loan word tells nothing.
    """
    text = text[:_LONGEST_LOOK].lower()
    words = _WORD.findall(text)
    letters = sum(map(len, words))
    latin = sum(len(word) for word in words if max(word) < "\u0250")
    if letters >= 10 and latin < letters / 2:
        return OTHER_SCRIPT
    languages, disease = _languages()
    counts = {
        name: sum((word in known) * (2 if word in disease else 1) for word in words)
        for name, known in languages.items()
    }
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] > counts[READ] and counts[best] >= 2 else ""


@lru_cache(maxsize=1)
def _languages() -> tuple[dict[str, frozenset[str]], frozenset[str]]:
    """Words by language, and names of the disease."""
    lists = word_lists("languages.toml")
    disease = frozenset(lists.pop("disease"))
    return {name: frozenset(words) for name, words in lists.items()}, disease
