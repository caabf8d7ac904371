"""Choosing a finished model's temperature and threshold on validation studies, and keeping them in its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors
from scipy.special import expit, logit

from pe_app.common.errors import InputError
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.ct.volume_io import read_volume
from pe_app.evaluation.roc import fit_temperature, threshold_for_sensitivity
from pe_app.model.detector import THRESHOLD, Decision, Detector
from pe_app.studies import Study
from pe_app.training.stages import LABELS, ClassifierTraining, split

SURE = 1e-7
"""Probabilities nearer to 0 or 1 than this are taken for this; single precision tells no more."""


def calibrate(
    studies: Sequence[Study],
    model: Path,
    out: Path,
    sensitivity: float | None = None,
    progress: ProgressCallback = silent,
) -> Decision:
    """Write a copy of a model whose probabilities are calibrated and whose threshold finds a share of the positives.

    Both are chosen on the labelled validation studies of the list: those marked so, or those that its training held
    out. The order of studies, and so the AUC, stays. Studies that the model refuses do not take part.

    Args:
        studies: the list that the model was trained with, or validation studies that it never saw.
        model: a detector with both stages trained; its own decision is replaced.
        out: where the calibrated model is written; may be ``model``.
        sensitivity: share of the positive validation studies at or above the threshold; None keeps 0.5.
        progress: told after every study; may raise ``Cancelled``.

    Raises:
        InputError: if the model is not trained, or fewer than 2 validation studies of either label are analysed.
    """
    if sensitivity is not None and not 0 < sensitivity <= 1:
        raise InputError(f"the sensitivity must lie above 0 and at most 1, got {sensitivity}")
    detector = Detector.load(model)
    record = detector.card.classifier
    if record is None:
        raise InputError(f"model {model}: its stage II is not trained, its probabilities mean nothing: train it first")
    detector = replace(detector, decision=Decision())
    kept = ClassifierTraining(
        validation_fraction=float(record.settings.get("validation_fraction") or 0.2),
        seed=int(record.settings.get("seed") or 0),
    )
    chosen = [study for study in split(studies, kept) if study.split == "validation" and study.label in LABELS]
    truth, probabilities = [], []
    for number, study in enumerate(chosen):
        progress(Progress("validation studies", number, len(chosen), study.study))
        probability = detector.detect(read_volume(study.path)).detection.probability
        if probability is not None:
            truth.append(study.label == "positive")
            probabilities.append(probability)
    progress(Progress("validation studies", len(chosen), len(chosen)))
    if min(sum(truth), len(truth) - sum(truth)) < 2:
        raise InputError(
            f"{sum(truth)} positive and {len(truth) - sum(truth)} negative validation studies were analysed: at least "
            "2 of either are needed, and dozens for a threshold worth having"
        )

    logits = logit(np.clip(probabilities, SURE, 1 - SURE))
    temperature = fit_temperature(truth, logits)
    threshold = THRESHOLD
    if sensitivity is not None:
        # the last bits of a probability differ between machines: a study on the threshold must stay above it
        threshold = max(threshold_for_sensitivity(truth, expit(logits / temperature), sensitivity) - 1e-6, 0.0)
    detector = replace(detector, decision=Decision(temperature, threshold, sensitivity, len(truth), sum(truth)))
    detector.save(out, half=_is_half(model))
    return detector.decision


def _is_half(model: Path) -> bool:
    """Whether the file keeps its matrices in half precision."""
    with safetensors.safe_open(model, "pt") as file:
        return any(file.get_slice(name).get_dtype() == "F16" for name in file.keys())  # noqa: SIM118
