"""A radiology report becomes a label: positive, negative or uncertain for acute embolism, with the deciding sentence.

The impression decides; the findings where it says nothing of embolism; an addendum overrides both. Every mention of
embolism in a sentence collects what the words in its scope say of it (absent, possible, chronic, resolved, an
artifact, a mere indication), in the manner of NegEx and ConText; the mentions of the deciding section are then weighed.
The phrases are data: ``rules/*.toml``, their sources and licences in ``rules/NOTICE``.

Limits: English only; a label is mined, not read, so look at the sentences before training on them.
"""

from __future__ import annotations

import csv
import io
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.studies import Study

Verdict = Literal["positive", "negative", "uncertain"]
Location = Literal["central", "lobar", "segmental", "subsegmental", ""]
Side = Literal["right", "left", "bilateral", ""]
Acuity = Literal["acute", "chronic", "resolved", ""]

COLUMNS = ("study", "label", "sentence", "location", "side", "acuity", "not_diagnostic")


@dataclass(frozen=True)
class ReportLabel:
    """What a report says of acute pulmonary embolism.

    Attributes:
        label: positive where acute embolism is described (or embolism without an age), negative where it is denied or
            only chronic or resolved, uncertain where it is possible or not excluded, or nothing is said of it.
        sentence: the sentence that decided, as written; empty where the report says nothing of embolism.
        location: the most central level of the emboli described.
        side: where they lie; a saddle embolus is bilateral.
        acuity: acute for every positive report; chronic or resolved where the report denies acute embolism so.
        not_diagnostic: the study as a whole could not answer; never set for a positive report.
    """

    label: Verdict
    sentence: str = ""
    location: Location = ""
    side: Side = ""
    acuity: Acuity = ""
    not_diagnostic: bool = False


def label_report(text: str) -> ReportLabel:
    """The label of one report, as plain text with or without section headings."""
    sections = _sections(text)
    readings = {kind: _read(sections[kind]) for kind in ("addendum", "impression", "findings", "preliminary")}
    order = [readings["addendum"], readings["impression"], readings["findings"], readings["preliminary"]]
    deciding = next((r for r in order if r.mentions), None)
    general = next((r for r in order if r.clear_chest), None)
    doubt = next((r for r in order[:3] if r.not_diagnostic), None)
    if deciding is None:
        if doubt is not None:
            return ReportLabel("uncertain", doubt.not_diagnostic, not_diagnostic=True)
        return ReportLabel("negative", general.clear_chest) if general is not None else ReportLabel("uncertain")

    label, chosen, acuity = _weigh(deciding)
    heard = order[: order.index(deciding) + 1]
    unanswered = next((r.not_diagnostic for r in heard if r.not_diagnostic), "")
    if not unanswered and all(m.limited for m in deciding.mentions):
        unanswered = deciding.smaller_unseen
    if label == "negative" and unanswered:
        label, chosen, acuity = "uncertain", replace(chosen, sentence=unanswered), ""
    if label == "negative" and not acuity:
        acuity = next((m.acuity for m in readings["findings"].mentions if m.label == "negative" and m.acuity), "")
    ours = {m.clause for m in deciding.mentions if m.is_described(label, acuity)}
    described = ours | {m.clause for m in readings["findings"].mentions if m.is_described(label, acuity)}
    return ReportLabel(
        label=label,
        sentence=chosen.sentence,
        location=_most_central(ours) or _most_central(described),
        side=_side_of(ours) or _side_of(described),
        acuity=acuity,
        not_diagnostic=doubt is not None and label != "positive",
    )


def label_reports(csv_in: str | Path, csv_out: str | Path, progress: ProgressCallback = silent) -> dict[str, int]:
    """Label the reports of a CSV with the columns ``study`` and ``report``; write ``COLUMNS``, all or nothing.

    Returns:
        How many reports got each label.

    Raises:
        InputError: naming file and line, if a column is missing, a study is empty or stands twice.
    """
    rows = list(_csv_rows(Path(csv_in), ("study", "report")))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    counts = dict.fromkeys(get_args(Verdict), 0)
    for done, row in enumerate(rows):
        if done % 200 == 0:
            progress(Progress("label reports", done, len(rows)))
        found = label_report(row["report"])
        counts[found.label] += 1
        doubt = "yes" if found.not_diagnostic else "no"
        writer.writerow((row["study"], found.label, found.sentence, found.location, found.side, found.acuity, doubt))
    write_durably(Path(csv_out), text.getvalue())
    progress(Progress("label reports", len(rows), len(rows)))
    return counts


def read_labels(path: str | Path) -> dict[str, ReportLabel]:
    """The labels that ``label_reports`` wrote, perhaps corrected by hand, by study."""
    labels = {}
    for row in _csv_rows(Path(path), COLUMNS):
        if row["label"] not in get_args(Verdict):
            raise InputError(f"{path}: study {row['study']} has the label {row['label']!r}; use {get_args(Verdict)}")
        labels[row["study"]] = ReportLabel(
            label=row["label"],  # type: ignore[arg-type]
            sentence=row["sentence"],
            location=row["location"],  # type: ignore[arg-type]
            side=row["side"],  # type: ignore[arg-type]
            acuity=row["acuity"],  # type: ignore[arg-type]
            not_diagnostic=row["not_diagnostic"] == "yes",
        )
    return labels


def label_studies(studies: Sequence[Study], labels: Mapping[str, ReportLabel]) -> tuple[Study, ...]:
    """The study list with the labels of the reports filled in.

    A label that is already there stays: a person may have set it. A report that says nothing of embolism leaves the
    label unknown.
    """
    return tuple(
        replace(study, label=labels[study.study].label)
        if not study.label and study.study in labels and labels[study.study].sentence
        else study
        for study in studies
    )


# --- rules -----------------------------------------------------------------------------------------------------------

TARGET = "(?:PE|DEFECT|THROMBUS)"
TOKENS = {
    "other": "OTHER",
    "chronic_embolism": "chronic PE",
    "embolism": "PE",
    "defect": "DEFECT",
    "chronic_thrombus": "chronic THROMBUS",
    "thrombus": "THROMBUS",
}
"""What the mentions of ``targets.toml`` are replaced by before modifiers are looked for."""


class _Modifier(NamedTuple):
    """One entry of ``modifiers.toml``; reach in words, 0 for the whole clause."""

    kind: str
    direction: str
    reach: int


def _rule_file(name: str) -> str:
    return (files("pe_app.reports") / "rules" / name).read_text("utf-8")


def _any_of(groups: Mapping[str, Sequence[str]]) -> str:
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


def _group(match: re.Match[str]) -> str:
    """The name of the group of ``_any_of`` that matched."""
    return str(match.lastgroup).rstrip("_")


def _compiled(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile(_any_of({"found": patterns}))


class _Rules:
    """All rule files, compiled once."""

    def __init__(self) -> None:
        targets: dict[str, list[str]] = tomllib.loads(_rule_file("targets.toml"))
        statements: dict[str, list[str]] = tomllib.loads(_rule_file("statements.toml"))
        sections: dict[str, list[str]] = tomllib.loads(_rule_file("sections.toml"))
        spelling: dict[str, str] = tomllib.loads(_rule_file("spelling.toml"))
        places: dict[str, dict[str, list[str]]] = tomllib.loads(_rule_file("places.toml"))
        entries = tomllib.loads(_rule_file("modifiers.toml"))["modifier"]
        self.spelling = re.compile("|".join(f"({pattern})" for pattern in spelling))
        self.spelled = tuple(spelling.values())
        self.targets = re.compile(_any_of({kind: targets[kind] for kind in TOKENS}))
        self.pulmonary = _compiled(targets["pulmonary_context"])
        self.other_vessel = _compiled(targets["other_context"])
        self.other_finding = _compiled(targets["other_findings"])
        self.modifiers = re.compile(_any_of({f"m{k}": e["patterns"] for k, e in enumerate(entries)}))
        self.entries = {f"m{k}": _Modifier(e["kind"], e["direction"], e.get("reach", 0)) for k, e in enumerate(entries)}
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


RULES = _Rules()

# --- sections and sentences -------------------------------------------------------------------------------------------

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
_PLAIN = str.maketrans("\u2013\u2014\u2019\u2018\u201c\u201d\xa0\r", "--''\"\" \n")


def _sections(text: str) -> dict[str, list[str]]:
    """The report's sentences by kind of section; what stands before any heading counts as findings."""
    text = text.replace("\r\n", "\n").translate(_PLAIN)
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
            sections["findings" if kind == "body" else kind] += _sentences(body)
    return sections


def _after_ignored(body: str, *, with_findings: bool) -> list[str]:
    """What follows a history or technique without a heading of its own: the report's text."""
    paragraphs = re.split(r"\n\s*\n", body.strip(), maxsplit=1)
    rest = _sentences(paragraphs[1]) if len(paragraphs) > 1 else []
    return rest if with_findings else _sentences(paragraphs[0])[1:] + rest


def _sentences(text: str) -> list[str]:
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


# --- mentions ---------------------------------------------------------------------------------------------------------

_NAMES = (
    "bol", "obl", "blo", "thromb", "clot", "defect", "defec", "the fact", "webs", "web ", "band", "cte", "luminal",
    "recanal", "vte", "pte", "occlusive", "synech",
)  # fmt: skip
_SHORT_NAME = re.compile(r"p\.?e(?!\w\w)")
"""What every mention of embolism has one of; looking for substrings is cheap."""
_KEYWORDS = (
    "pulmonary", "segmental", "diagnos", "negative", "normal", "unremarkable", "inadequate", "no acute", "no other",
    "no significant", "ctpa", "angiogram", "artifact", "artefact", "failed", "failure", "contributory", "interpret",
    "conclusive", "indeterminate",
)  # fmt: skip
"""What every other sentence that matters has one of."""

_LIMITED = re.compile(r"central|\blarge|main|saddle|proximal|massive|\blobar|major|gross|(?:big|sizeable)")
_TO_SEGMENTAL = re.compile(r"segment|sub-?segment")


@dataclass(frozen=True)
class _Mention:
    """One mention of embolism and what is said of it.

    Attributes:
        label: what this mention alone would make of the report.
        acuity: chronic or resolved where that is why it is negative, acute where so called.
        sentence: as written.
        clause: lower case, for place and side.
        persistent: known from before, and still there.
        limited: denied of the large branches only.
        denies_acute: denies acute embolism by that word.
    """

    label: Verdict
    acuity: Acuity
    sentence: str
    clause: str
    persistent: bool = False
    limited: bool = False
    denies_acute: bool = False

    def is_described(self, label: Verdict, acuity: Acuity) -> bool:
        """Whether its place is the place of the emboli that the report's label speaks of."""
        return self.label == label and (label != "negative" or (self.acuity == acuity and acuity != ""))


@dataclass(frozen=True)
class _Reading:
    """A section read: its mentions, and the sentences that say in general how the study went ("" for none)."""

    mentions: list[_Mention]
    not_diagnostic: str
    smaller_unseen: str
    clear_chest: str


def _read(sentences: Sequence[str]) -> _Reading:
    mentions: list[_Mention] = []
    not_diagnostic = smaller_unseen = clear_chest = ""
    previous = before = asked = ""
    named_before = False
    for sentence in sentences:
        plain = sentence.lower()
        if mentions and mentions[-1].label == "positive" and _FIELD_OF_PLACE.match(plain):
            mentions[-1] = replace(mentions[-1], clause=f"{mentions[-1].clause} {plain}")
        named = _may_name_embolism(plain)
        answer = _ANSWER.match(plain) if named_before else None
        if answer and (answer["none"] or asked):
            mentions.append(
                _Mention("positive" if answer["yes"] else "negative", "", f"{asked} {sentence}".strip(), plain)
            )
        named_before, asked = named, sentence if sentence.endswith("?") else ""
        if not named and not any(word in plain for word in _KEYWORDS):
            previous = ""
            continue
        text = _tokenised(plain) if named else plain
        corrected = list(RULES.corrected.finditer(text))
        if corrected:
            text = text[corrected[-1].end() :]
        if previous and RULES.continues.match(text):
            text = f"{previous.rstrip('.')}, {text}"
            mentions = [m for m in mentions if m.sentence != before]
            sentence = f"{before} {sentence}"
        found = _mentions(text, sentence)
        if not found and RULES.clear.search(text):
            found = (_Mention("negative", "", sentence, text),)
        mentions += found
        if not not_diagnostic and any(
            RULES.not_diagnostic.search(clause) and not RULES.elsewhere.search(clause)
            for clause in re.split(r"[;,] |\bbut\b|\bhowever\b", text)
        ):
            not_diagnostic = sentence
        if not smaller_unseen and any(
            not re.search("sub-?segmental", match.group()) or re.search(r"(?<!sub)(?<!sub-)segmental", match.group())
            for match in RULES.smaller_unseen.finditer(text)
        ):
            smaller_unseen = sentence
        if not clear_chest and RULES.clear_chest.search(text):
            clear_chest = sentence
        previous, before = (text, sentence) if found else ("", "")
    return _Reading(mentions, not_diagnostic, smaller_unseen, clear_chest)


_FIELD_OF_PLACE = re.compile(
    r"(?:most )?(?:proximal )?(?:location|level|extent|laterality|side|distribution)\b[^:.]{0,20}:"
)
"""A template's line on where the embolism of the line before lies."""
_ANSWER = re.compile(r"(?:(?P<none>none\b)|(?:no|nil|negative|(?P<yes>yes|positive|present)) ?(?:[.,;:]|$))")
"""To "Is there PE?", or to "evaluated for PE."; only the second kind of question may be left without a mark."""


def _may_name_embolism(plain: str) -> bool:
    return any(word in plain for word in _NAMES) or _SHORT_NAME.search(plain) is not None


@lru_cache(maxsize=4096)
def _tokenised(plain: str) -> str:
    """A lower-case sentence with one spelling, its mentions of embolism replaced by upper-case words."""
    spelled = RULES.spelling.sub(lambda match: RULES.spelled[(match.lastindex or 1) - 1], plain)
    return RULES.targets.sub(lambda match: TOKENS[_group(match)], spelled)


_TOKEN = re.compile(rf"\b{TARGET}\b")


@lru_cache(maxsize=4096)
def _mentions(text: str, sentence: str) -> tuple[_Mention, ...]:
    """The mentions of one tokenised sentence, judged; those that say nothing are left out."""
    targets = [match for match in _TOKEN.finditer(text) if _is_pulmonary(match, text)]
    if not targets:
        return ()
    modifiers = list(RULES.modifiers.finditer(text))
    inside = [(match.start(), match.end()) for match in modifiers]
    cuts = [
        match.start()
        for match in RULES.boundaries.finditer(text)
        if not any(start < match.end() and match.start() < end for start, end in inside)
    ]
    edges = [0, *cuts, len(text)]
    found: list[_Mention] = []
    for low, high in pairwise(edges):
        clause = text[low:high]
        here = [match for match in targets if low <= match.start() < high]
        said = [match for match in modifiers if low <= match.start() < high]
        for target in here:
            kinds = {RULES.entries[_group(m)].kind for m in said if _applies(m, target, here, text)}
            mention = _judged(kinds, clause, sentence)
            if mention is not None:
                found.append(replace(mention, clause=_place(target, here, text[low:high], low)))
        if not here and found and any(RULES.entries[_group(m)].kind == "unsure" for m in said):
            doubted = RULES.smaller.search(clause) or re.search(
                r"^\W*(?:but|however|though|although)?,? ?(?:it|this)\b", clause
            )
            if doubted and not RULES.other_finding.search(clause) and re.search("exclu|rule", clause):
                found.append(_Mention("uncertain", "", sentence, clause))
    return tuple(found)


def _place(target: re.Match[str], targets: Sequence[re.Match[str]], clause: str, low: int) -> str:
    """The part of a clause that can say where a mention lies: between commas, where there are other mentions."""
    start, end = 0, len(clause)
    if any(t.start() < target.start() for t in targets):
        start = max(clause.rfind(",", 0, target.start() - low), 0)
    if any(t.start() > target.start() for t in targets):
        comma = clause.find(",", target.end() - low)
        end = comma if comma >= 0 else end
    return clause[start:end]


def _is_pulmonary(target: re.Match[str], text: str) -> bool:
    """Whether a defect or thrombus lies in a pulmonary artery: the vessel named nearest to it decides."""
    if target.group() == "PE":
        return True

    def distance(pattern: re.Pattern[str]) -> int:
        return min(
            (
                max(match.start() - target.end(), target.start() - match.end())
                for match in pattern.finditer(text)
                if match.span() != target.span()
            ),
            default=10_000,
        )

    pulmonary, other = distance(RULES.pulmonary), distance(RULES.other_vessel)
    return pulmonary <= other


_NEW_STATEMENT = re.compile(r", (?:no|not|without|there|the|now|new|acute|again|with|today|currently|repeat)\b")


def _applies(modifier: re.Match[str], target: re.Match[str], targets: list[re.Match[str]], text: str) -> bool:
    """Whether a modifier speaks of a mention in the same clause."""
    kind, direction, reach = RULES.entries[_group(modifier)]
    if modifier.start() <= target.start() and target.end() <= modifier.end():
        return direction in ("inside", "forward", "both")
    if direction == "inside":
        return False
    if modifier.end() <= target.start():
        between = text[modifier.end() : target.start()]
        if direction == "backward" or (reach and len(between.split()) > reach):
            return False
        if kind == "silent" and _NEW_STATEMENT.search(between):
            return False
        return not (kind == "absent" and RULES.causes.search(between))
    between = text[target.end() : modifier.start()]
    if direction == "forward" or (reach and len(between.split()) > reach):
        return False
    if kind == "acute" and any(0 <= t.start() - modifier.end() < 40 for t in targets):
        return False  # it belongs to the mention after it
    if kind in ("absent", "unsure", "possible", "resolved", "artifact") and RULES.other_finding.search(between):
        return False
    nearer = [t for t in targets if target.end() <= t.start() and t.end() <= modifier.start()]
    if nearer and kind in ("absent", "resolved", "unsure"):
        gap = text[target.end() : nearer[0].start()]
        return "," not in gap or len(gap) <= 12
    return True


def _judged(kinds: set[str], clause: str, sentence: str) -> _Mention | None:
    """One mention's label from the kinds of modifiers in its scope; None where it asserts nothing."""
    if "present" in kinds and not ("chronic" in kinds and "acute" not in kinds):
        return _Mention("positive", "acute", sentence, clause)
    if "silent" in kinds and "resolved" not in kinds:
        return None
    if "unsure" in kinds:
        return _Mention("uncertain", "", sentence, clause)
    if "absent" in kinds:
        gone: Acuity = "resolved" if re.search(r"\b(?:residual|persist|remaining)", clause) else ""
        denies_acute = bool(re.search(r"\bacute", clause)) and "chronic" not in clause
        limited = bool(_LIMITED.search(clause)) and not _TO_SEGMENTAL.search(clause)
        return _Mention("negative", gone, sentence, clause, limited=limited, denies_acute=denies_acute)
    if "artifact" in kinds:
        return _Mention("negative", "", sentence, clause)
    if "resolved" in kinds:
        return _Mention("negative", "resolved", sentence, clause)
    if "chronic" in kinds and not kinds & {"acute", "age_unknown"}:
        return _Mention("negative", "chronic", sentence, clause)
    if "chronic" in kinds and "acute" in kinds and re.search("(?:rather than|not|over|no) (?:an )?acute", clause):
        return _Mention("negative", "chronic", sentence, clause)
    if "earlier" in kinds and "persistent" not in kinds:
        return None
    if "possible" in kinds:
        return _Mention("uncertain", "", sentence, clause)
    return _Mention("positive", "acute", sentence, clause, persistent="persistent" in kinds and "acute" not in kinds)


def _weigh(reading: _Reading) -> tuple[Verdict, _Mention, Acuity]:
    """The label of a section, the mention that decided, the acuity.

    Embolism anywhere outweighs doubt, doubt outweighs denial. Emboli known from before beside a denial of acute ones
    are chronic.
    """
    by_label: dict[Verdict, list[_Mention]] = {label: [] for label in get_args(Verdict)}
    for mention in reading.mentions:
        by_label[mention.label].append(mention)
    positives, negatives = by_label["positive"], by_label["negative"]
    if positives:
        if all(m.persistent for m in positives) and any(m.denies_acute and not m.limited for m in negatives):
            return "negative", next(m for m in negatives if m.denies_acute), "chronic"
        return "positive", positives[0], "acute"
    if by_label["uncertain"]:
        return "uncertain", by_label["uncertain"][0], ""
    aged: Acuity = next((m.acuity for m in negatives if m.acuity), "")
    plain = [m for m in negatives if not m.acuity] or negatives
    return "negative", plain[0], aged


_LOBE_BRANCH = re.compile(r"branch(?:es)? (?:of|to|off|from) (?:the )?(?:\w+ ){1,4}lobe (?:pulmonary )?arter\w+")


def _most_central(clauses: Set[str]) -> Location:
    for location, pattern in RULES.locations.items():
        if any(pattern.search(_LOBE_BRANCH.sub("branch", clause)) for clause in clauses):
            return location  # type: ignore[return-value]
    return ""


_OTHER_SIDED = r"(?:right|left|bilateral|both|bibasal)(?:[- ]sided)?(?: (?!PE|DEFECT|THROMBUS)[\w-]+){0,3} (?:"


def _side_of(clauses: Set[str]) -> Side:
    found = set()
    for clause in clauses:
        own = _SIDE_OF_OTHERS.sub("", clause)
        found |= {side for side, pattern in RULES.sides.items() if pattern.search(own)}
    if "bilateral" in found or found >= {"right", "left"}:
        return "bilateral"
    return "right" if "right" in found else "left" if "left" in found else ""


_SIDE_OF_OTHERS = re.compile(_OTHER_SIDED + RULES.other_finding.pattern + ")")


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a CSV that has at least ``columns``; every study once."""
    csv.field_size_limit(sys.maxsize)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f'{path.name}: is not UTF-8 text: in Excel save it as "CSV UTF-8"') from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    seen: set[str] = set()
    try:
        header = {name.strip().lower(): name for name in reader.fieldnames or ()}
        missing = [column for column in columns if column not in header]
        if missing:
            raise InputError(f"{path.name}: the column {missing[0]!r} is missing; the first line must name {columns}")
        for row in reader:
            values = {column: (row[header[column]] or "") for column in columns}
            study = values["study"] = values["study"].strip()
            if not study or study in seen:
                wrong = f"the study {study} stands twice" if study else "the study is empty"
                raise InputError(f"{path.name} line {reader.line_num}: {wrong}: list every study once")
            seen.add(study)
            yield values
    except csv.Error as error:
        raise InputError(f"{path.name} line {reader.line_num}: is not a CSV file: {error}") from error
