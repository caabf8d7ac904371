"""What the mentions of embolism in a section say: absent, possible, chronic, resolved, an artifact, or there.

Every mention collects the words in whose scope it lies, in the manner of NegEx and ConText.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from pe_app.reports.phrases import RULES, TARGET, TOKENS, group_of

Verdict = Literal["positive", "negative", "uncertain"]
Acuity = Literal["acute", "chronic", "resolved", ""]

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
class Mention:
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
class Reading:
    """A section read: its mentions, and the sentences that say in general how the study went ("" for none)."""

    mentions: list[Mention]
    not_diagnostic: str
    smaller_unseen: str
    clear_chest: str


def read_section(sentences: Sequence[str]) -> Reading:
    """The mentions in the sentences of one section, and what they say of the study as a whole."""
    mentions: list[Mention] = []
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
                Mention("positive" if answer["yes"] else "negative", "", f"{asked} {sentence}".strip(), plain)
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
            found = (Mention("negative", "", sentence, text),)
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
    return Reading(mentions, not_diagnostic, smaller_unseen, clear_chest)


_FIELD_OF_PLACE = re.compile(
    r"(?:most )?(?:proximal )?(?:location|level|extent|laterality|side|distribution)\b[^:.]{0,20}:"
)
"""A template's line on where the embolism of the line before lies."""
_ANSWER = re.compile(r"(?:(?P<none>none\b)|(?:no|nil|negative|n|(?P<yes>yes|positive|present|y)) ?(?:[.,;:]|$))")
"""To "Is there PE?", or to "evaluated for PE."; only the second kind of question may be left without a mark."""


def _may_name_embolism(plain: str) -> bool:
    return any(word in plain for word in _NAMES) or _SHORT_NAME.search(plain) is not None


@lru_cache(maxsize=4096)
def _tokenised(plain: str) -> str:
    """A lower-case sentence with one spelling, its mentions of embolism replaced by upper-case words."""
    spelled = RULES.spelling.sub(lambda match: RULES.spelled[(match.lastindex or 1) - 1], plain)
    return RULES.targets.sub(lambda match: TOKENS[group_of(match)], spelled)


_TOKEN = re.compile(rf"\b{TARGET}\b")


@lru_cache(maxsize=4096)
def _mentions(text: str, sentence: str) -> tuple[Mention, ...]:
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
    found: list[Mention] = []
    for low, high in pairwise(edges):
        clause = text[low:high]
        here = [match for match in targets if low <= match.start() < high]
        said = [match for match in modifiers if low <= match.start() < high]
        for target in here:
            kinds = {RULES.entries[group_of(m)].kind for m in said if _applies(m, target, here, text)}
            mention = _judged(kinds, clause, sentence)
            if mention is not None:
                found.append(replace(mention, clause=_place(target, here, text[low:high], low)))
        if not here and found and any(RULES.entries[group_of(m)].kind == "unsure" for m in said):
            doubted = RULES.smaller.search(clause) or re.search(
                r"^\W*(?:but|however|though|although)?,? ?(?:it|this)\b", clause
            )
            if doubted and not RULES.other_finding.search(clause) and re.search("exclu|rule", clause):
                found.append(Mention("uncertain", "", sentence, clause))
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
    kind, direction, reach = RULES.entries[group_of(modifier)]
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


def _judged(kinds: set[str], clause: str, sentence: str) -> Mention | None:
    """One mention's label from the kinds of modifiers in its scope; None where it asserts nothing."""
    if "present" in kinds and not ("chronic" in kinds and "acute" not in kinds):
        return Mention("positive", "acute", sentence, clause)
    if "silent" in kinds and "resolved" not in kinds:
        return None
    if "unsure" in kinds:
        return Mention("uncertain", "", sentence, clause)
    if "absent" in kinds:
        gone: Acuity = "resolved" if re.search(r"\b(?:residual|persist|remaining)", clause) else ""
        denies_acute = bool(re.search(r"\bacute", clause)) and "chronic" not in clause
        limited = bool(_LIMITED.search(clause)) and not _TO_SEGMENTAL.search(clause)
        return Mention("negative", gone, sentence, clause, limited=limited, denies_acute=denies_acute)
    if "artifact" in kinds:
        return Mention("negative", "", sentence, clause)
    if "resolved" in kinds:
        return Mention("negative", "resolved", sentence, clause)
    if "chronic" in kinds and not kinds & {"acute", "age_unknown"}:
        return Mention("negative", "chronic", sentence, clause)
    if "chronic" in kinds and "acute" in kinds and re.search("(?:rather than|not|over|no) (?:an )?acute", clause):
        return Mention("negative", "chronic", sentence, clause)
    if "earlier" in kinds and "persistent" not in kinds:
        return None
    if "possible" in kinds:
        return Mention("uncertain", "", sentence, clause)
    return Mention("positive", "acute", sentence, clause, persistent="persistent" in kinds and "acute" not in kinds)
