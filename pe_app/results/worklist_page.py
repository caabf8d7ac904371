"""The worklist of many studies as one HTML page: the most suspicious first, and why the others have no number.

Self-contained: pictures are in it, nothing is loaded, and its only script filters and orders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from pe_app.model.detection import NOT_CLINICAL, Detection
from pe_app.results.outcome import Outcome, Share, by_probability
from pe_app.results.rendering import data_uri, render
from pe_app.results.result_files import THUMBNAILS

LISTED_CANDIDATES = 3
"""Places that a row of the worklist names; the study's own page names all."""


def worklist_page(outcomes: Sequence[Outcome], out: Path, total: int = 0) -> str:
    """The page.

    Args:
        outcomes: one per study, in any order.
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
    values = {
        "warnings": _warnings(analysed),
        "share": share,
        "bar": (
            ("done", share.analysed),
            ("refused", share.refused),
            ("failed", share.failed),
            ("waiting", share.waiting),
        ),
        "model": model,
        "dates": _dates(outcomes),
        "others": others,
        "unread": _unread_words(len(others)),
        "filters": (
            ("all", "All", len(outcomes)),
            ("above", suspicious, counts["above"]),
            ("none", "Not analysed", counts["none"]),
        ),
        "patients": any(outcome.identity for outcome in outcomes),
        "numbered": share.analysed + share.refused + share.failed,
        "sections": (
            ("analysed", order, [_row(outcome, out, model) for outcome in analysed]),
            ("not-analysed", "Not analysed", [_row(outcome, out, model) for outcome in others]),
        ),
    }
    return render("worklist.html", values)


def _row(outcome: Outcome, out: Path, usual_model: str) -> dict[str, object]:
    """One study: number, name, why and where, pictures, curve."""
    detection = outcome.detection
    probability = detection.probability if detection else None
    notes = [("stop", outcome.message)] if outcome.message else []
    notes += [("stop", f"The result is here, but: {outcome.problem}")] if outcome.problem else []
    if detection is not None:
        if detection.status == "analysed":  # of a refused one the study's own page lists the lesser reasons too
            listed = (reason for reason in detection.reasons if reason.code not in NOT_CLINICAL)
            notes += [("warn", reason.message) for reason in listed]
        notes += [("warn", f"By another model: {_model(outcome)}")] if _model(outcome) != usual_model else []
        if detection.positive and not detection.candidates:
            notes.append(("warn", "No place stands out: distrust the number."))
    extent = detection.extent_estimate if detection is not None else None
    css = f"{outcome.kind} not-clinical" if outcome.not_clinical and probability is not None else outcome.kind
    return {
        "outcome": outcome,
        "css": css,
        "find": " ".join((outcome.study, outcome.patient, outcome.accession, outcome.study_date)).lower(),
        "probability": -1 if probability is None else probability,
        "number": "" if probability is None else f"{probability:.2f}",
        "side": outcome.not_clinical or (_side(detection) if detection else ""),
        "link": f"{quote(outcome.folder)}/index.html" if outcome.folder else "",
        "identity": outcome.identity,
        "notes": notes,
        "places": _places(detection) if detection else [],
        "extent": f"Extent estimate {extent.volume_ml:.0f} ml" if extent and extent.volume_ml else "",
        **_pictures(outcome, out),
        **_curve(detection),
    }


def _side(detection: Detection) -> str:
    return f"{'at or above' if detection.positive else 'below'} {detection.threshold:.2f}"


def _places(detection: Detection) -> list[str]:
    """The strongest candidates in words, ``slice 144 of 300 from the feet, left, peripheral``."""
    return [
        ", ".join(part for part in (detection.image.slice_name(candidate.slice_index), candidate.place) if part)
        for candidate in detection.candidates[:LISTED_CANDIDATES]
    ]


def _pictures(outcome: Outcome, out: Path) -> dict[str, object]:
    """The thumbnails with their slices' names; empty where there are none."""
    try:
        content = (out / outcome.folder / THUMBNAILS).read_bytes() if outcome.pictured else b""
    except OSError:
        content = b""
    words = "Strongest slices with attention" if outcome.kind != "none" else "Slices of this study"
    captions = []
    if outcome.detection is not None:
        image = outcome.detection.image
        captions = [image.slice_name(slice_index).removesuffix(" from the feet") for slice_index in outcome.pictured]
    return {"picture": data_uri(content) if content else "", "picture_words": words, "captions": captions}


def _curve(detection: Detection | None) -> dict[str, object]:
    """Slab probabilities from the feet to the head on 200 x 64 units, candidates marked."""
    if detection is None or not detection.evidence:
        return {"curve": "", "marks": []}
    low, high = detection.evidence[0].z_mm, detection.evidence[-1].z_mm

    def place(z_mm: float, probability: float) -> tuple[str, str]:
        return f"{200 * (z_mm - low) / max(high - low, 1e-6):.1f}", f"{64 * (1 - probability):.1f}"

    points = " ".join(",".join(place(slab.z_mm, slab.probability)) for slab in detection.evidence)
    listed = detection.candidates[:LISTED_CANDIDATES]
    return {"curve": points, "marks": [place(candidate.z_mm, candidate.slab_probability) for candidate in listed]}


def _model(outcome: Outcome) -> str:
    model = outcome.detection.model if outcome.detection else None
    return f"{model.name} {model.version}, SHA-256 {model.sha256[:12]}" if model else ""


def _warnings(analysed: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Why the numbers are not a clinical result, in large letters: the model's own words."""
    reasons = {
        reason.message: NOT_CLINICAL[reason.code]
        for outcome in analysed
        if outcome.detection
        for reason in outcome.detection.reasons
        if reason.code in NOT_CLINICAL
    }
    return [(title, message) for message, title in reasons.items()]


def _unread_words(count: int) -> str:
    studies = "1 study was" if count == 1 else f"{count} studies were"
    return f"{studies} not analysed: read {'it' if count == 1 else 'them'} without the program. The reasons are below."


def _dates(outcomes: Sequence[Outcome]) -> str:
    dates = sorted(outcome.date[:16].replace("T", " ") for outcome in outcomes if outcome.date)
    if not dates:
        return "not yet"
    return f"{dates[-1]} UTC" if dates[0][:10] == dates[-1][:10] else f"{dates[0]} to {dates[-1]} UTC"
