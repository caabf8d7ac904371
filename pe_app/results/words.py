"""A detection in sentences, for pages, pictures, DICOM objects and the command line."""

from __future__ import annotations

from pe_app.model.detection import Candidate, Detection

_LEVELS = {"central": "main or lobar artery", "peripheral": "segmental artery or beyond"}


def verdict(detection: Detection) -> str:
    """One line on the study: its probability against the threshold or why there is none, after any caution."""
    if detection.probability is None:
        return "Not analysed: " + "; ".join(reason.code for reason in detection.reasons if reason.refuses)
    side = "at or above" if detection.positive else "below"
    said = f"Probability of embolism {detection.probability:.3f}, {side} the threshold of {detection.threshold:.2f}"
    return f"{detection.caution}. {said}" if detection.caution else said


def extent_words(detection: Detection) -> str:
    """One sentence on how far attention reaches; empty where nothing is strong enough or it is not known."""
    extent = detection.extent_estimate
    if extent is None or not extent.volume_ml:
        return ""
    return (
        f"Extent estimate: attention over {extent.volume_ml:.0f} ml in {100 * extent.slab_share:.0f}% of the lung's "
        "length. Not a clot burden: attention is wider than a clot."
    )


def place_words(candidate: Candidate) -> str:
    """Where a candidate lies, as far as side and level can be told: ``right, segmental artery or beyond``."""
    level = _LEVELS.get(candidate.level or "", "")
    return ", ".join(word for word in (candidate.side or "", level) if word) or "side and level indeterminate"
