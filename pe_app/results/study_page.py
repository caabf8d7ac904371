"""One study as a self-contained page: the answer and its caution, key slices, a stack to scroll, where to look."""

from __future__ import annotations

from pe_app.ct.volume import Volume
from pe_app.model.detection import NOT_CLINICAL, Candidate, Detection
from pe_app.model.detector import DetectionResult
from pe_app.results.outcome import identity_words
from pe_app.results.pictures import ATTENTION_COLOURS, key_slices, stack
from pe_app.results.rendering import data_uri, render
from pe_app.results.words import extent_words, place_words


def study_page(result: DetectionResult, volume: Volume | None, name: str) -> str:
    """The page, about 1 to 2 MB; nothing is loaded from elsewhere, its only script scrolls.

    Args:
        result: the detection and its attention.
        volume: the CT; None where the files made none: then there are no pictures.
        name: what the page calls the study.
    """
    detection = result.detection
    image = detection.image
    size, spacing = " x ".join(map(str, image.size)), " x ".join(f"{value:.2f}" for value in image.spacing_mm)
    source = volume.source if volume is not None else None
    pictures = key_slices(result, volume) if volume is not None else ()
    values = {
        "name": name,
        "detection": detection,
        "identity": identity_words(*source.patient_study) if source else "",
        "kind": _kind(detection),
        "caution": " ".join(reason.message for reason in detection.reasons if reason.code in NOT_CLINICAL),
        "reasons": [reason for reason in detection.reasons if reason.code not in NOT_CLINICAL],
        "key_slices": [
            {"slice_index": one.slice_index, "caption": one.caption, "uri": data_uri(one.jpeg)} for one in pictures
        ],
        "stack": stack(result, volume) if volume is not None else None,
        "candidates": [_candidate(candidate, detection) for candidate in detection.candidates],
        "extent": extent_words(detection),
        "image": f"{size} voxels of {spacing} mm (slice, row, column)",
        "gradient": ", ".join(f"rgb{colour}" for colour in ATTENTION_COLOURS),
        "curve": " ".join(
            ",".join(_place(detection, k, slab.probability)) for k, slab in enumerate(detection.evidence)
        ),
        "marks": [_mark(candidate, detection) for candidate in detection.candidates] if detection.evidence else [],
    }
    return render("study.html", values)


def _kind(detection: Detection) -> str:
    if detection.probability is None:
        return "none"
    return "not-clinical" if detection.caution else "above" if detection.positive else "below"


def _candidate(candidate: Candidate, detection: Detection) -> dict[str, object]:
    """A candidate in words, and as the cells of a row."""
    strength = candidate.peak * candidate.slab_probability
    details = [f"slab probability {candidate.slab_probability:.2f}", f"attention x probability {strength:.2f}"]
    if candidate.volume_ml is not None and candidate.size_mm is not None:
        details.append(f"region of attention {candidate.size_mm:.0f} mm, {candidate.volume_ml:.1f} ml")
    first, last = candidate.slices or (candidate.slice_index, candidate.slice_index)
    return {
        "slice_index": candidate.slice_index,
        "where": detection.image.slice_name(candidate.slice_index),
        "place": place_words(candidate),
        "details": ", ".join(details),
        "cells": (
            str(candidate.rank),
            f"{detection.image.slice_name(first)} to {detection.image.slice_name(last)}",
            f"{candidate.z_mm:.1f}",
            " x ".join(f"{value:.0f}" for value in candidate.extent_mm),
            ", ".join(f"{value:.0f}" for value in candidate.centre_lps_mm),
            f"{candidate.slab_probability:.2f}",
            f"{strength:.2f}",
        ),
    }


def _place(detection: Detection, slab: float, probability: float) -> tuple[str, str]:
    """On the curve's 300 x 80 units: slabs from the feet to the head, probability upwards."""
    return f"{300 * slab / max(len(detection.evidence) - 1, 1):.1f}", f"{80 * (1 - probability):.1f}"


def _mark(candidate: Candidate, detection: Detection) -> dict[str, object]:
    slab = min(detection.evidence, key=lambda one: abs(one.z_mm - candidate.z_mm))
    x, y = _place(detection, detection.evidence.index(slab), candidate.slab_probability)
    return {"x": x, "y": y, "text_y": f"{float(y) + 12:.1f}", "rank": candidate.rank}
