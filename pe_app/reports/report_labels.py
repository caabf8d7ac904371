"""A radiology report becomes a label: positive, negative or uncertain for acute embolism, with the deciding sentence.

The impression decides; the findings where it says nothing of embolism; an addendum overrides both. Every mention of
embolism in a sentence collects what the words in its scope say of it (absent, possible, chronic, resolved, an
artifact, a mere indication), in the manner of NegEx and ConText; the mentions of the deciding section are then weighed.
The phrases are data: ``rules/*.toml``, their sources and licences in ``rules/NOTICE``.

Limits: English only, and a report in another language is marked as unread; a label is mined, not read, so look at the
sentences before training on them.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pe_app.reports.abbreviations import as_written, hide_other_meanings
from pe_app.reports.decoding import plain_text
from pe_app.reports.language import other_language
from pe_app.reports.mentions import Acuity, Mention, Reading, Verdict, read_section
from pe_app.reports.phrases import RULES
from pe_app.reports.sentences import sections_of

Location = Literal["central", "lobar", "segmental", "subsegmental", ""]
Side = Literal["right", "left", "bilateral", ""]


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
        unread: the language of a report that the rules cannot read, which then says nothing; empty where it was read.
    """

    label: Verdict
    sentence: str = ""
    location: Location = ""
    side: Side = ""
    acuity: Acuity = ""
    not_diagnostic: bool = False
    unread: str = ""


def label_report(text: str) -> ReportLabel:
    """The label of one report, with or without section headings, as a hospital's systems hand it out."""
    text = plain_text(text)
    if language := other_language(text):
        return ReportLabel("uncertain", unread=language)
    label = _label_plain(hide_other_meanings(text))
    return replace(label, sentence=as_written(label.sentence))


def _label_plain(text: str) -> ReportLabel:
    sections = sections_of(text)
    readings = {kind: read_section(sections[kind]) for kind in ("addendum", "impression", "findings", "preliminary")}
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


def _weigh(reading: Reading) -> tuple[Verdict, Mention, Acuity]:
    """The label of a section, the mention that decided, the acuity.

    Embolism anywhere outweighs doubt, doubt outweighs denial. Emboli known from before beside a denial of acute ones
    are chronic.
    """
    by_label: dict[Verdict, list[Mention]] = {label: [] for label in get_args(Verdict)}
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
