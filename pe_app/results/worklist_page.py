"""The worklist of many studies as one HTML page: the most suspicious first, and why the others have no number.

Self-contained: pictures are in it, nothing is loaded, and its only script sets the filter. Of a patient it holds no
more than the names that the studies were given.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from pe_app.model.detection import NOT_CLINICAL, NOTICE, Detection
from pe_app.results.outcome import Outcome, Share, by_probability
from pe_app.results.result_files import THUMBNAILS

LISTED_CANDIDATES = 3
"""Places that a line of the worklist names; the study's own page names all."""


def worklist_page(outcomes: Sequence[Outcome], out: Path, total: int = 0) -> str:
    """The page.

    Args:
        outcomes: one a study, in any order.
        out: folder of all results, where the studies' folders with their thumbnails are.
        total: studies that were given, where some are still waiting.
    """
    share = Share.of(outcomes, total)
    ordered = by_probability(outcomes)
    analysed = [outcome for outcome in ordered if outcome.kind != "none"]
    others = [outcome for outcome in ordered if outcome.kind == "none"]
    models = Counter(_model(outcome) for outcome in outcomes if outcome.detection)
    model = models.most_common(1)[0][0] if models else ""
    counts = Counter(outcome.kind for outcome in outcomes)
    threshold = next((outcome.detection.threshold for outcome in analysed if outcome.detection), None)
    suspicious = "Suspicious" if threshold is None else f"Suspicious (from {threshold:.2f})"
    order = "By probability of embolism"
    if any(outcome.not_clinical for outcome in analysed):
        suspicious, order = f"From {threshold:.2f}", "By the model's number: not a clinical result"
    filters = "".join(
        f'<label><input type="radio" name="show" value="{value}"{" checked" if value == "all" else ""}>'
        f"<span>{html.escape(words)} <b>{count}</b></span></label>"
        for value, words, count in (
            ("all", "All", len(outcomes)),
            ("above", suspicious, counts["above"]),
            ("none", "Not analysed", counts["none"]),
        )
    )
    numbered = share.analysed + share.refused + share.failed
    return _PAGE.format(
        script_sha=_SCRIPT_SHA,
        script=_SCRIPT,
        style=_STYLE,
        notice=html.escape(NOTICE),
        warning=_model_warning(analysed),
        share=html.escape(str(share)),
        bar="".join(
            f'<i class="{kind}" style="flex:{count}"></i>'
            for kind, count in (("done", share.analysed), ("refused", share.refused), ("failed", share.failed))
            if count
        ),
        details=html.escape(share.details),
        unread=f'<p class="unread"><a href="#not-analysed">{_unread_words(len(others))}</a></p>' if others else "",
        model=html.escape(model or "none"),
        dates=html.escape(_dates(outcomes)),
        filters=filters,
        order=html.escape(order),
        rows="".join(_row(outcome, out, model) for outcome in analysed),
        others="".join(_row(outcome, out, model) for outcome in others),
        others_hidden="" if others else " hidden",
        analysed_hidden="" if analysed else " hidden",
        empty="" if numbered else '<p class="muted">No study was looked at yet.</p>',
    )


def _row(outcome: Outcome, out: Path, usual_model: str) -> str:
    """One study's line: number, name, why and where, pictures, curve."""
    detection = outcome.detection
    name = html.escape(outcome.study)
    link = f'<a href="{quote(outcome.folder)}/index.html">{name}</a>' if outcome.folder else name
    if detection is not None and detection.probability is not None:
        number = f'<b class="p">{detection.probability:.2f}</b>'
        number += f"<small>{html.escape(outcome.not_clinical) or _side(detection)}</small>"
    else:
        number = f'<b class="no">not analysed</b><small>{html.escape(outcome.status)}</small>'
    notes = [("stop", outcome.message)] if outcome.message else []
    notes += [("stop", f"The result is here, but: {outcome.problem}")] if outcome.problem else []
    if detection is not None:
        if detection.status == "analysed":  # of a refused one the study's own page tells the lesser reasons too
            listed = (reason for reason in detection.reasons if reason.code not in NOT_CLINICAL)
            notes += [("warn", reason.message) for reason in listed]
        notes += [("warn", f"By another model: {_model(outcome)}")] if _model(outcome) != usual_model else []
    where = "".join(f"<li>{html.escape(words)}</li>" for words in (_places(detection) if detection is not None else []))
    extent = detection.extent_estimate if detection is not None else None
    return (
        f'<article class="{outcome.kind}{" not-clinical" if outcome.not_clinical and outcome.kind != "none" else ""}" '
        f'data-name="{html.escape(outcome.study.lower())}">'
        f'<div class="number">{number}</div><div class="words"><h3>{link}</h3>'
        + "".join(f'<p class="{kind}">{html.escape(words)}</p>' for kind, words in notes)
        + (f"<ol>{where}</ol>" if where else "")
        + (f'<p class="muted">Extent estimate {extent.volume_ml:.0f} ml</p>' if extent and extent.volume_ml else "")
        + f"</div>{_pictures(outcome, out)}{_curve(detection) if detection is not None else ''}</article>"
    )


def _side(detection: Detection) -> str:
    return f"{'at or above' if detection.positive else 'below'} {detection.threshold:.2f}"


def _places(detection: Detection) -> list[str]:
    """The strongest candidates in words, ``slice 143, left, peripheral, 22 mm``."""
    words = []
    for candidate in detection.candidates[:LISTED_CANDIDATES]:
        parts = [f"slice {candidate.slice_index}", candidate.place]
        parts += [f"{candidate.size_mm:.0f} mm"] if candidate.size_mm else []
        words.append(", ".join(part for part in parts if part))
    return words


def _pictures(outcome: Outcome, out: Path) -> str:
    """The thumbnails with their slices' numbers; empty where there are none."""
    try:
        content = (out / outcome.folder / THUMBNAILS).read_bytes() if outcome.pictured else b""
    except OSError:
        content = b""
    if not content:
        return '<div class="pictures"></div>'
    captions = "".join(f"<span>slice {slice_index}</span>" for slice_index in outcome.pictured)
    what = "Strongest slices with attention" if outcome.kind != "none" else "Slices of this study"
    return (
        f'<figure class="pictures"><img alt="{what}" src="data:image/jpeg;base64,'
        f'{base64.b64encode(content).decode()}"><figcaption>{captions}</figcaption></figure>'
    )


def _curve(detection: Detection) -> str:
    """Slab probabilities from the feet to the head as a small SVG, candidates marked."""
    if not detection.evidence:
        return '<div class="curve"></div>'
    low, high = detection.evidence[0].z_mm, detection.evidence[-1].z_mm
    width, height = 200.0, 64.0

    def x(z_mm: float) -> float:
        return width * (z_mm - low) / max(high - low, 1e-6)

    points = " ".join(f"{x(slab.z_mm):.1f},{height * (1 - slab.probability):.1f}" for slab in detection.evidence)
    marks = "".join(
        f'<circle cx="{x(candidate.z_mm):.1f}" cy="{height * (1 - candidate.slab_probability):.1f}" r="3"/>'
        for candidate in detection.candidates[:LISTED_CANDIDATES]
    )
    return (
        f'<figure class="curve"><svg viewBox="-4 -4 {width + 8:.0f} {height + 8:.0f}" role="img" '
        'aria-label="Probability of every slab, from 0 to 1, from the feet to the head">'
        f'<path d="M0 0H{width:.0f}M0 {height / 2:.0f}H{width:.0f}M0 {height:.0f}H{width:.0f}"/>'
        f'<polygon points="0,{height:.0f} {points} {width:.0f},{height:.0f}"/><polyline points="{points}"/>{marks}'
        "</svg><figcaption><span>feet</span><span>slab probability, 0 to 1</span><span>head</span></figcaption>"
        "</figure>"
    )


def _model(outcome: Outcome) -> str:
    model = outcome.detection.model if outcome.detection else None
    return f"{model.name} {model.version}, SHA-256 {model.sha256[:12]}" if model else ""


def _model_warning(analysed: Sequence[Outcome]) -> str:
    """Why the numbers are not a clinical result, in large letters: the model's own words."""
    reasons = {
        reason.message: NOT_CLINICAL[reason.code]
        for outcome in analysed
        if outcome.detection
        for reason in outcome.detection.reasons
        if reason.code in NOT_CLINICAL
    }
    return "".join(
        f'<p class="model"><b>{html.escape(title)}: not a clinical result.</b> {html.escape(message)}</p>'
        for message, title in reasons.items()
    )


def _unread_words(count: int) -> str:
    studies = "1 study was" if count == 1 else f"{count} studies were"
    return f"{studies} not analysed: read {'it' if count == 1 else 'them'} without the program. The reasons are below."


def _dates(outcomes: Sequence[Outcome]) -> str:
    dates = sorted(outcome.date[:16].replace("T", " ") for outcome in outcomes if outcome.date)
    if not dates:
        return "not yet"
    return f"{dates[-1]} UTC" if dates[0][:10] == dates[-1][:10] else f"{dates[0]} to {dates[-1]} UTC"


_SCRIPT = """
"use strict";
const rows = [...document.querySelectorAll("article")];
const find = document.getElementById("find");
function show() {
  const wanted = document.querySelector("input[name=show]:checked").value;
  const words = find.value.toLowerCase().split(/\\s+/);
  for (const row of rows) {
    const fits = wanted === "all" || row.classList.contains(wanted);
    row.hidden = !(fits && words.every(word => row.dataset.name.includes(word)));
  }
  for (const section of document.querySelectorAll("section"))
    section.hidden = !section.querySelector("article:not([hidden])");
  document.getElementById("nothing").hidden = rows.length === 0 || rows.some(row => !row.hidden);
}
for (const input of document.querySelectorAll("#filters input")) input.addEventListener("input", show);
show();
"""

_SCRIPT_SHA = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
"""The page's policy lets this one script run and no other, whatever a name might hold."""

_STYLE = """
:root { --back: #101418; --card: #181e24; --line: #2b343d; --ink: #e6ebf0; --muted: #93a1ae; --amber: #ffb000;
  --red: #ff7a6b; --blue: #7db7e8; }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; margin: 0 auto;
  max-width: 1500px; padding: 0 1.2rem 3rem; }
a { color: var(--ink); text-underline-offset: .2em; } a:hover { color: var(--amber); }
.notice { background: #5c1f1a; color: #fff; font-weight: 600; margin: 0 -1.2rem; padding: .45rem 1.2rem; }
.model { background: #6b4a00; border-radius: 6px; color: #fff; margin: 1rem 0 0; padding: .6rem 1rem; }
header { align-items: end; display: flex; flex-wrap: wrap; gap: .4rem 2.5rem; margin: 1.1rem 0 .8rem; }
h1 { color: var(--muted); font-size: 1rem; font-weight: 500; margin: 0; width: 100%; }
.share { font-size: 1.9rem; font-weight: 650; line-height: 1.1; margin: 0; }
.facts { color: var(--muted); margin: 0; }
.bar { background: var(--line); border-radius: 4px; display: flex; gap: 2px; height: 8px; overflow: hidden;
  width: 100%; }
.bar i { background: var(--blue); } .bar .refused { background: var(--amber); } .bar .failed { background: var(--red); }
.unread { margin: .2rem 0 .8rem; } .unread a { color: var(--amber); font-weight: 600; }
#filters { background: var(--back); border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .5rem;
  padding: .6rem 0; position: sticky; top: 0; z-index: 1; }
#filters label { cursor: pointer; } #filters [type=radio] { opacity: 0; position: absolute; }
#filters span { border: 1px solid var(--line); border-radius: 99px; display: block; padding: .25rem .9rem; }
#filters :checked + span { background: var(--ink); color: var(--back); }
#filters :focus-visible + span { outline: 2px solid var(--amber); }
#find { background: var(--card); border: 1px solid var(--line); border-radius: 99px; color: var(--ink); flex: 1 1 9rem;
  font: inherit; max-width: 20rem; min-width: 0; padding: .25rem .9rem; }
h2 { font-size: 1.05rem; margin: 1.4rem 0 .2rem; } [hidden] { display: none !important; }
article { align-items: start; background: var(--card); border-left: 5px solid var(--line); border-radius: 6px;
  display: grid; gap: .4rem 1.3rem; grid-template-columns: 7.2rem minmax(11rem, 1fr) minmax(0, 470px) 210px;
  margin-top: .6rem; padding: .8rem 1rem; }
article.above { border-color: var(--red); } article.below { border-color: var(--blue); }
article.none { border-color: var(--amber); } article.not-clinical { border-color: var(--muted); }
.number b { display: block; } .number small { color: var(--muted); display: block; }
.p { font-size: 2rem; font-variant-numeric: tabular-nums; line-height: 1.1; } .above .p { color: var(--red); }
.not-clinical .p { color: var(--muted); font-size: 1.4rem; font-weight: 500; } .no { color: var(--amber); }
.not-clinical .number small { color: var(--amber); }
h3 { font-size: 1.05rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
.words p { margin: .2rem 0; overflow-wrap: anywhere; } .words ol { margin: .2rem 0; padding-left: 1.3rem; }
.stop { color: var(--amber); } .warn { color: var(--amber); font-size: .9em; }
.muted { color: var(--muted); font-size: .85em; }
footer { border-top: 1px solid var(--line); margin-top: 1.6rem; max-width: 60rem; padding-top: .6rem; }
figure { margin: 0; } .pictures img { border-radius: 4px; display: block; width: 100%; }
.pictures img { max-height: 9rem; object-fit: contain; object-position: left; }
figcaption { color: var(--muted); display: flex; font-size: .78rem; } .pictures span { flex: 1; }
.curve figcaption { justify-content: space-between; }
svg { display: block; overflow: visible; width: 100%; } path { fill: none; stroke: var(--line); }
polyline { fill: none; stroke: var(--blue); stroke-width: 1.6; vector-effect: non-scaling-stroke; }
polygon { fill: var(--blue); opacity: .22; } circle { fill: var(--amber); }
.above polyline { stroke: var(--red); } .above polygon { fill: var(--red); }
.not-clinical polyline { stroke: var(--muted); } .not-clinical polygon, .not-clinical circle { fill: var(--muted); }
@media (max-width: 1000px) {
  article { grid-template-columns: 6.4rem 1fr; } .pictures, .curve { grid-column: 1 / -1; }
  .pictures:empty, .curve:empty { display: none; } .curve { max-width: 470px; }
}
@media (max-width: 520px) {
  body { padding: 0 .7rem 2rem; } .notice { margin: 0 -.7rem; padding: .45rem .7rem; } .share { font-size: 1.45rem; }
  article { grid-template-columns: 1fr; padding: .7rem .8rem; }
  .number { align-items: baseline; display: flex; gap: .7rem; }
}
@media print {
  :root { --back: #fff; --card: #fff; --line: #bbb; --ink: #000; --muted: #444; --amber: #7a4b00; --red: #a01c10;
    --blue: #1c5b91; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  html, body { font-size: 10px; } body { max-width: none; } #filters { display: none; }
  article { border: 1px solid var(--line); border-left-width: 5px; break-inside: avoid;
    grid-template-columns: 6rem 1fr 240px 150px; }
  .pictures, .curve { grid-column: auto; } .number { display: block; }
}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
 script-src 'sha256-{script_sha}'; base-uri 'none'; form-action 'none'">
<title>Worklist</title><style>{style}</style></head><body>
<p class="notice">{notice}</p>
{warning}
<header><h1>Worklist, pulmonary embolism</h1><p class="share">{share}</p><p class="facts">{details}</p>
<p class="facts">Model {model}<br>Analysed {dates}</p><div class="bar">{bar}</div></header>
{unread}
<div id="filters">{filters}<input id="find" type="search" placeholder="Find a study" aria-label="Find a study"></div>
{empty}<p class="muted" id="nothing" hidden>No study fits.</p>
<section{analysed_hidden}><h2>{order}</h2>{rows}</section>
<section id="not-analysed"{others_hidden}><h2>Not analysed</h2>{others}</section>
<footer class="muted">Numbers are the model's probability of embolism anywhere in the study. The curve is its
probability slab by slab, a dot a place to look at; the pictures are the strongest slices, coloured where the model
looked. Slices are counted from 0 at the feet; left and right are the patient's. The extent estimate is the volume of
attention, which is wider than a clot: it is not a clot burden.</footer>
<script>{script}</script>
</body></html>
"""
