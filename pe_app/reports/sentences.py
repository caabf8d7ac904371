"""Sections and sentences of a report."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pe_app.reports.phrases import RULES

_FUNCTION_WORDS = frozenset(
    ("the", "a", "an", "in", "of", "and", "or", "with", "for", "to", "no", "at", "on", "is", "are", "was", "were",
     "within", "into", "from", "by", "as", "that", "which", "this", "right", "left", "lower", "upper", "pulmonary",
     "evidence", "small", "large", "acute", "main", "segmental", "lobar")
)  # fmt: skip
"""A line that ends with one of these goes on in the next."""

LONGEST = 1000
"""Characters of a sentence; what goes on longer is no sentence, and is cut so that no text can take for ever."""

_NEW_ITEM = re.compile(r"[-*•>#]|\(?\d{1,2}[.)]\s|\(?[a-zA-Z][.)]\s|[A-Za-z][A-Za-z /&-]{1,35}:")
_GLUED = re.compile(r"\.(?<=[a-z)]{2}\.)(?=[A-Z][a-z])")
_SENTENCE_END = re.compile(
    r" (?:(?<=[\w)\]%\"'][.!?] )|(?<=[.!?][\"')\]] )|(?<=[.;:] )(?=\d{1,2}[.)] )|\d{1,2}[.)] (?=[A-Z])"
    r"|(?:period|full stop)\b(?=$| (?:no|the|there|new|next|[A-Z]))(?: (?:new|next) (?:line|paragraph))? ?)"
)
_ENUMERATION = re.compile(r"^[\s\-*•>#]*(?:\(?\d{1,2}[.)]\s+)?")


_TYPED_HEADING = re.compile(r"^(?P<mark>[ \t>*#_=-]*)(?P<word>[A-Za-z]{5,15})(?=[ \t]*(?::|$))", re.MULTILINE)
_HEADINGS = (
    "impression", "findings", "conclusion", "indication", "history", "technique", "comparison", "addendum",
    "examination", "procedure", "recommendation", "interpretation",
)  # fmt: skip
"""Long enough that a word one letter off, alone before a colon or on a line, can only be a misspelling."""


def _mend_headings(text: str) -> str:
    """The text with headings that lack a letter, or have one too many, another or two swapped, spelled right."""
    return _TYPED_HEADING.sub(lambda match: match["mark"] + _mended(match["word"]), text)


def _mended(word: str) -> str:
    plain = word.lower()
    if plain in _HEADINGS or f"{plain}s" in _HEADINGS or plain.removesuffix("s") in _HEADINGS:
        return word
    return next((heading.upper() for heading in _HEADINGS if _one_edit_apart(plain, heading)), word)


def _one_edit_apart(one: str, other: str) -> bool:
    """Whether one insertion, deletion, replacement or swap of neighbours makes one word of the other."""
    start = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    a, b = one[start:], other[start:]
    return a[1:] == b or a == b[1:] or a[1:] == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


def sections_of(text: str) -> dict[str, list[str]]:
    """The sentences of a plain text by kind of section; what stands before any heading counts as findings."""
    text = _mend_headings(text)
    parts: list[tuple[str, str]] = []
    kind, start = "body", 0
    for match in RULES.heading.finditer(text):
        found = str(match.lastgroup).split("_", 1)[1]
        if found == "within" and (kind not in ("ignored", "body", "preliminary") or ":" not in match.group()):
            continue
        parts.append((kind, text[start : match.start()]))
        kind, start = ("findings", match.start()) if found == "within" else (found, match.end())
    parts.append((kind, text[start:]))

    sections: dict[str, list[str]] = {name: [] for name in ("addendum", "impression", "findings", "preliminary")}
    with_findings = any(k == "findings" and body.strip() for k, body in parts)
    reported = in_addendum = False
    for kind, body in parts:
        if kind == "addendum":
            in_addendum = reported
        elif kind == "impression" and in_addendum:
            kind = "addendum"  # a second impression after an addendum belongs to it
        if kind in ("impression", "findings") and body.strip():
            reported = True
        if kind == "ignored":
            sections["findings"] += _after_ignored(body, with_findings=with_findings)
        else:
            sections["findings" if kind == "body" else kind] += sentences_of(body)
    return sections


def _after_ignored(body: str, *, with_findings: bool) -> list[str]:
    """What follows a history or technique without a heading of its own: the report's text."""
    paragraphs = re.split(r"\n\s*\n", body.strip(), maxsplit=1)
    rest = sentences_of(paragraphs[1]) if len(paragraphs) > 1 else []
    return rest if with_findings else sentences_of(paragraphs[0])[1:] + rest


def sentences_of(text: str) -> list[str]:
    """Sentences with single spaces; lines broken by a template are joined, list items are kept apart."""
    items: list[str] = []
    previous = ""
    for line in text.split("\n"):
        line = " ".join(line.split())
        starts = (
            not previous
            or previous[-1] in ".;:?!"
            or _NEW_ITEM.match(line)
            or (line[:1].isupper() and len(previous) < 60 and not _goes_on(previous))
        )
        if line and starts:
            items.append(line)
        elif line:
            items[-1] += " " + line
        previous = line
    sentences = [sentence for item in items for sentence in _split(item)]
    return [s[start : start + LONGEST] for s in sentences for start in range(0, len(s), LONGEST)]


def _goes_on(line: str) -> bool:
    return line.endswith(",") or line.rsplit(" ", 1)[-1].lower() in _FUNCTION_WORDS


def _split(item: str) -> Iterator[str]:
    """The sentences of one line or list item, without enumeration."""
    start = 0
    item = _GLUED.sub(". ", _ENUMERATION.sub("", item))
    for end in _SENTENCE_END.finditer(item):
        before = item[start : end.start()]
        word = before[:-1].rsplit(" ", 1)[-1] if before.endswith(".") else ""
        number = item[end.end() : end.end() + 1].isdigit()
        if word and RULES.abbreviations.fullmatch(word) and (number or not word.lower().endswith("no")):
            continue
        if before.strip(" .()").isdigit():
            continue
        if before.strip():
            yield _ENUMERATION.sub("", before).strip()
        start = end.end()
    if item[start:].strip():
        yield _ENUMERATION.sub("", item[start:]).strip()
