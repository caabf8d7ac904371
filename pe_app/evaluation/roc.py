"""How well probabilities tell positive studies from negative ones: AUC, operating points, calibration.

Everywhere ``truth`` is ``(studies,)`` of 0 and 1, ``scores`` is ``(studies,)`` of finite numbers, larger meaning
"embolism", and a study counts as positive where ``score >= threshold``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit
from scipy.stats import binomtest, norm, rankdata
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score, roc_curve


@dataclass(frozen=True)
class Auc:
    """Area under the ROC curve with its DeLong variance and confidence interval."""

    value: float
    low: float
    high: float
    variance: float


@dataclass(frozen=True)
class AucDifference:
    """AUC of the first model minus that of the second on the same studies, and the paired DeLong test of 0."""

    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Proportion:
    """A share ``count / total`` with its Wilson interval; nan, from 0 to 1, where ``total`` is 0."""

    count: int
    total: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold makes of the studies. The five proportions carry Wilson intervals."""

    threshold: float
    accuracy: Proportion
    sensitivity: Proportion
    specificity: Proportion
    ppv: Proportion
    npv: Proportion


@dataclass(frozen=True)
class CalibrationBin:
    """Studies whose probability lies in (low, high], the first bin including 0."""

    low: float
    high: float
    studies: int
    mean_probability: float
    positive_share: float


@dataclass(frozen=True)
class Calibration:
    """Agreement of probabilities with frequencies: Brier score, expected calibration error, reliability curve."""

    brier: float
    expected_error: float
    bins: tuple[CalibrationBin, ...]


def auc(truth: ArrayLike, scores: ArrayLike, confidence: float = 0.95, patients: Sequence[str] | None = None) -> Auc:
    """Area under the ROC curve with DeLong's confidence interval, or Obuchowski's where patients are given.

    Scores ``(runs, studies)`` of several trainings give the mean of their AUCs; its interval is that of the choice of
    studies and takes into account that the runs judged the same ones.

    ``AUC +- z sqrt(variance)``, cut to 0..1: the plain interval, as the paper reports it (0.812, 0.789 to 0.835 on 517
    positive and 1,643 negative studies). It shrinks to a point at a perfect AUC; trust it with dozens of studies of
    either kind, not with a handful. A tie between a positive and a negative counts one half.

    Studies of one patient are alike: two of them say less than two of different patients, while a pair of the same
    chest with and without embolism says more. ``patients``, one for each study, takes both into account.

    Raises:
        ValueError: if the shapes differ, a value is not finite, or a class has fewer than 2 studies or patients.

    Source: DeLong et al. 1988; fast algorithm: Sun and Xu 2014, IEEE Signal Processing Letters 21(11); clusters:
    Obuchowski 1997, Biometrics 53(2).
    """
    labels, values = _checked_runs(truth, scores)
    value = float(np.mean([roc_auc_score(labels, run) for run in values]))
    variance = float(np.atleast_2d(_covariance(labels, values, patients)).mean())
    margin = float(norm.ppf(0.5 + confidence / 2)) * variance**0.5
    return Auc(value, max(value - margin, 0.0), min(value + margin, 1.0), variance)


def compare_aucs(
    truth: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    confidence: float = 0.95,
    patients: Sequence[str] | None = None,
) -> AucDifference:
    """Paired DeLong test of whether two models differ in AUC on the same studies; by patients as ``auc``.

    ``z = (AUC_1 - AUC_2) / sqrt(v_11 + v_22 - 2 v_12)``, two-sided. Models that order all studies alike have
    variance 0 and p-value 1. Scores ``(runs, studies)`` of several trainings compare the means of their AUCs; the test
    is of these runs on other studies, not of other runs.

    Source: DeLong et al. 1988, Biometrics 44(3).
    """
    labels, first_runs = _checked_runs(truth, first)
    _, second_runs = _checked_runs(truth, second)
    runs = np.concatenate([first_runs, second_runs])
    areas = np.array([roc_auc_score(labels, run) for run in runs])
    weights = np.repeat([1 / len(first_runs), -1 / len(second_runs)], [len(first_runs), len(second_runs)])
    difference = float(weights @ areas)
    deviation = max(float(weights @ _covariance(labels, runs, patients) @ weights), 0.0) ** 0.5
    margin = float(norm.ppf(0.5 + confidence / 2)) * deviation
    if deviation < 1e-12:
        p_value = 1.0 if abs(difference) < 1e-12 else 0.0
    else:
        p_value = float(2 * norm.sf(abs(difference) / deviation))
    return AucDifference(difference, difference - margin, difference + margin, p_value)


def proportion(count: int, total: int, confidence: float = 0.95) -> Proportion:
    """A share with its Wilson score interval (scipy's ``binomtest``)."""
    if total == 0:
        return Proportion(0, 0, float("nan"), 0.0, 1.0)
    interval = binomtest(count, total).proportion_ci(confidence, method="wilson")
    return Proportion(count, total, count / total, float(interval.low), float(interval.high))


def operating_point(truth: ArrayLike, scores: ArrayLike, threshold: float) -> OperatingPoint:
    """Accuracy, sensitivity, specificity, PPV and NPV of calling ``score >= threshold`` positive."""
    labels, values = _checked(truth, scores)
    called = values >= threshold
    true_positive = int((called & labels).sum())
    false_positive = int((called & ~labels).sum())
    positive, negative = int(labels.sum()), int((~labels).sum())
    true_negative, false_negative = negative - false_positive, positive - true_positive
    return OperatingPoint(
        threshold=float(threshold),
        accuracy=proportion(true_positive + true_negative, len(labels)),
        sensitivity=proportion(true_positive, positive),
        specificity=proportion(true_negative, negative),
        ppv=proportion(true_positive, true_positive + false_positive),
        npv=proportion(true_negative, true_negative + false_negative),
    )


def at_specificity(truth: ArrayLike, scores: ArrayLike, specificity: float) -> OperatingPoint:
    """The operating point of highest sensitivity among those with at least this specificity.

    The threshold is infinite where only calling nothing positive is specific enough.
    """
    labels, values = _checked(truth, scores)
    false_share, true_share, thresholds = roc_curve(labels, values, drop_intermediate=False)
    allowed = 1 - false_share >= specificity - 1e-12
    return operating_point(labels, values, float(thresholds[np.where(allowed, true_share, -1.0).argmax()]))


def threshold_for_sensitivity(truth: ArrayLike, scores: ArrayLike, sensitivity: float) -> float:
    """The highest threshold that finds at least this share of the positive studies.

    It is the k-th largest score of the positives with ``k = ceil(sensitivity * positives)``. Choose it on the
    validation split, state it with the result on the test split.
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"sensitivity must lie above 0 and at most 1, got {sensitivity}")
    labels, values = _checked(truth, scores)
    positives = np.sort(values[labels])[::-1]
    return float(positives[int(np.ceil(sensitivity * len(positives) - 1e-9)) - 1])


def calibration(truth: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> Calibration:
    """Brier score, expected calibration error and reliability curve over equal bins of probability.

    ``Brier = mean((p - y)^2)``; ``ECE = sum_b n_b / n |mean p in b - share of positives in b|``. Empty bins are
    left out.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, section 2.
    """
    labels, values = _checked(truth, probabilities)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"probabilities must lie in 0..1, got {values.min()} to {values.max()}")
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], values)
    filled = []
    for index in np.unique(place):
        inside = place == index
        filled.append(
            CalibrationBin(
                low=float(edges[index]),
                high=float(edges[index + 1]),
                studies=int(inside.sum()),
                mean_probability=float(values[inside].mean()),
                positive_share=float(labels[inside].mean()),
            )
        )
    error = sum(b.studies * abs(b.mean_probability - b.positive_share) for b in filled) / len(labels)
    return Calibration(float(brier_score_loss(labels, values)), error, tuple(filled))


def fit_temperature(truth: ArrayLike, logits: ArrayLike) -> float:
    """The temperature T that makes ``sigmoid(logit / T)`` most likely on the validation split.

    Above 1 where the model is too sure of itself; the order of studies, and so the AUC, stay. Searched from 0.05 to
    20, where a perfectly separated split ends at 0.05.

    Source: Guo et al. 2017, section 4.2.
    """
    labels, values = _checked(truth, logits)

    def loss(log_temperature: float) -> float:
        return float(log_loss(labels, expit(values / np.exp(log_temperature)), labels=[False, True]))

    result = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(result.x))


def _covariance(
    labels: NDArray[np.bool_], scores: NDArray[np.float64], patients: Sequence[str] | None
) -> NDArray[np.float64]:
    """Covariance ``(models, models)`` of the AUCs of ``scores`` ``(models, studies)``.

    Placement values from midranks instead of all pairs: with m positives and n negatives
    ``V10_i = (rank among all - rank among positives) / n`` and ``V01_j = 1 - (rank among all - rank among
    negatives) / m``; covariance ``S10 / m + S01 / n``. O((m + n) log(m + n)) instead of O(m n).

    With patients (Obuchowski 1997) the deviations of a patient's studies are added up before they are squared, and a
    patient with studies of both kinds adds ``2 S11 / (m n)``.
    """
    positives, negatives = int(labels.sum()), int((~labels).sum())
    ranks = rankdata(scores, axis=1)
    among_positives = rankdata(scores[:, labels], axis=1)
    among_negatives = rankdata(scores[:, ~labels], axis=1)
    placement_positive = (ranks[:, labels] - among_positives) / negatives
    placement_negative = 1 - (ranks[:, ~labels] - among_negatives) / positives
    if patients is None:
        of_positives, of_negatives = (np.atleast_2d(np.cov(one)) for one in (placement_positive, placement_negative))
        return np.asarray(of_positives / positives + of_negatives / negatives)
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    if len(patient) != len(labels) or len(names) < 2:
        raise ValueError(f"each study needs its patient, and at least 2 patients, got {len(names)} of {len(labels)}")

    def summed(placement: NDArray[np.float64], of: NDArray[np.intp]) -> NDArray[np.float64]:
        deviation = placement - placement.mean(1, keepdims=True)
        return np.stack([np.bincount(of, row, minlength=len(names)) for row in deviation])

    by_positives, by_negatives = (
        summed(placement_positive, patient[labels]),
        summed(placement_negative, patient[~labels]),
    )
    with_positives, with_negatives = (len(np.unique(of)) for of in (patient[labels], patient[~labels]))
    mixed = by_positives @ by_negatives.T * len(names) / (len(names) - 1) / (positives * negatives)
    return np.asarray(
        by_positives @ by_positives.T * _inflated(with_positives) / positives**2
        + by_negatives @ by_negatives.T * _inflated(with_negatives) / negatives**2
        + mixed
        + mixed.T
    )


def _inflated(patients: int) -> float:
    return patients / max(patients - 1, 1)


def _checked_runs(truth: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """``_checked`` for one or several runs, as ``(runs, studies)``."""
    checked = [_checked(truth, run) for run in np.atleast_2d(np.asarray(scores, dtype=np.float64))]
    return checked[0][0], np.stack([values for _, values in checked])


def _checked(truth: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Truth as bool, scores as float64; ValueError unless both classes have 2 studies and all scores are finite."""
    labels, values = np.asarray(truth), np.asarray(scores, dtype=np.float64)
    if labels.shape != values.shape or labels.ndim != 1:
        raise ValueError(f"one score for every study is needed, got {labels.shape} and {values.shape}")
    if not np.isin(labels, (0, 1)).all() or not np.isfinite(values).all():
        raise ValueError("truth must be 0 or 1 and every score finite")
    labels = labels.astype(bool)
    if labels.sum() < 2 or (~labels).sum() < 2:
        raise ValueError(f"at least 2 studies of either kind are needed, got {labels.sum()} of {len(labels)} positive")
    return labels, values
