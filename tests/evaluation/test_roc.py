"""AUC, operating points and calibration against brute force, scikit-learn and the paper's numbers."""

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from pe_app.evaluation.roc import (
    at_specificity,
    auc,
    calibration,
    compare_aucs,
    fit_temperature,
    operating_point,
    proportion,
    threshold_for_sensitivity,
)


def two_models(seed: int, studies: int, *, tied: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = (rng.random(studies) < 0.4).astype(int)
    truth[:4] = 0, 1, 0, 1
    first = truth + rng.normal(0, 1.2, studies)
    second = 0.7 * first + rng.normal(0, 1, studies)
    return (truth, np.round(first, 0), np.round(second, 0)) if tied else (truth, first, second)


def delong_by_all_pairs(truth, models):
    """DeLong 1988 as written: kernel over all m x n pairs, one half for ties."""
    placements = []
    for scores in models:
        pairs = scores[truth == 1][:, None] - scores[truth == 0][None]
        kernel = (pairs > 0) + 0.5 * (pairs == 0)
        placements.append((kernel.mean(), kernel.mean(1), kernel.mean(0)))
    m, n = (truth == 1).sum(), (truth == 0).sum()
    covariance = np.zeros((len(models), len(models)))
    for i, (auc_i, v10_i, v01_i) in enumerate(placements):
        for j, (auc_j, v10_j, v01_j) in enumerate(placements):
            covariance[i, j] = ((v10_i - auc_i) * (v10_j - auc_j)).sum() / (m - 1) / m
            covariance[i, j] += ((v01_i - auc_i) * (v01_j - auc_j)).sum() / (n - 1) / n
    return [p[0] for p in placements], covariance


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("studies", [8, 61, 300])
def test_fast_delong_is_the_variance_over_all_pairs(studies, tied):
    truth, first, second = two_models(studies, studies, tied=tied)
    areas, covariance = delong_by_all_pairs(truth, [first, second])
    result = auc(truth, first)
    assert result.value == pytest.approx(areas[0], abs=1e-12)
    assert result.value == pytest.approx(roc_auc_score(truth, first), abs=1e-12)
    assert result.variance == pytest.approx(covariance[0, 0], abs=1e-12)
    margin = norm.ppf(0.975) * np.sqrt(covariance[0, 0])
    assert (result.low, result.high) == pytest.approx((max(areas[0] - margin, 0), min(areas[0] + margin, 1)))


@pytest.mark.parametrize("tied", [False, True])
def test_paired_test_is_the_one_over_all_pairs(tied):
    truth, first, second = two_models(5, 120, tied=tied)
    areas, covariance = delong_by_all_pairs(truth, [first, second])
    z = (areas[0] - areas[1]) / np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    result = compare_aucs(truth, first, second)
    assert result.value == pytest.approx(areas[0] - areas[1])
    assert result.p_value == pytest.approx(2 * (1 - norm.cdf(abs(z))))
    assert result.low < result.value < result.high


def test_interval_has_the_papers_width_at_the_papers_size():
    rng = np.random.default_rng(0)
    truth = np.repeat([1, 0], [517, 1643])
    distance = np.sqrt(2) * norm.ppf(0.812)  # two normal distributions with that AUC
    result = auc(truth, rng.normal(0, 1, 2160) + distance * truth)
    assert result.high - result.low == pytest.approx(0.835 - 0.789, abs=0.006)


def test_about_95_of_100_intervals_hold_the_true_auc():
    rng = np.random.default_rng(1)
    truth = np.repeat([1, 0], [60, 140])
    distance = np.sqrt(2) * norm.ppf(0.8)
    results = [auc(truth, rng.normal(0, 1, 200) + distance * truth) for _ in range(400)]
    assert 0.91 <= np.mean([r.low <= 0.8 <= r.high for r in results]) <= 0.98


def test_models_that_order_the_studies_alike_do_not_differ():
    truth, first, _ = two_models(2, 50, tied=False)
    result = compare_aucs(truth, first, np.exp(first))
    assert result.value == pytest.approx(0)
    assert result.p_value == 1


def test_wilson_interval_is_the_textbook_one():
    share, total, z = 81 / 263, 263, norm.ppf(0.975)  # Newcombe 1998, table I: 0.2553 to 0.3662
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    result = proportion(81, 263)
    assert (result.low, result.high) == pytest.approx((centre - half, centre + half))
    assert (result.low, result.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_operating_point_counts_what_lies_at_the_threshold_as_positive():
    point = operating_point([1, 1, 1, 0, 0, 0, 0], [0.9, 0.5, 0.4, 0.5, 0.3, 0.2, 0.1], 0.5)
    assert (point.sensitivity.count, point.sensitivity.total) == (2, 3)
    assert (point.specificity.count, point.specificity.total) == (3, 4)
    assert (point.ppv.count, point.ppv.total) == (2, 3)
    assert (point.npv.count, point.npv.total) == (3, 4)
    assert point.accuracy.value == pytest.approx(5 / 7)


def test_saying_negative_always_has_the_accuracy_of_the_prevalence():
    point = operating_point(np.repeat([1, 0], [517, 1643]), np.zeros(2160), 0.5)
    assert point.accuracy.value == pytest.approx(0.761, abs=0.0005)
    assert np.isnan(point.ppv.value)
    assert (point.ppv.low, point.ppv.high) == (0, 1)


@pytest.mark.parametrize("specificity", [0.8, 0.9, 0.95, 1.0])
def test_sensitivity_at_a_specificity_is_the_best_of_all_thresholds(specificity):
    truth, scores, _ = two_models(3, 80, tied=True)
    best = max(
        (scores[truth == 1] >= t).mean()
        for t in [*np.unique(scores), np.inf]
        if (scores[truth == 0] < t).mean() >= specificity
    )
    point = at_specificity(truth, scores, specificity)
    assert point.sensitivity.value == pytest.approx(best)
    assert point.specificity.value >= specificity


@pytest.mark.parametrize("sensitivity", [0.05, 0.8, 0.9, 0.95, 1.0])
def test_threshold_for_a_sensitivity_reaches_it_and_the_next_higher_one_does_not(sensitivity):
    truth, scores, _ = two_models(4, 90, tied=True)
    threshold = threshold_for_sensitivity(truth, scores, sensitivity)
    assert (scores[truth == 1] >= threshold).mean() >= sensitivity
    assert (scores[truth == 1] > threshold).mean() < sensitivity


def test_reliability_curve_is_the_one_of_scikit_learn():
    rng = np.random.default_rng(6)
    probabilities = np.concatenate([rng.random(300), [0.0, 0.1, 0.5, 1.0]])
    truth = (rng.random(304) < probabilities**2).astype(int)
    share, mean = calibration_curve(truth, probabilities, n_bins=10)
    result = calibration(truth, probabilities)
    assert [b.positive_share for b in result.bins] == pytest.approx(list(share))
    assert [b.mean_probability for b in result.bins] == pytest.approx(list(mean))
    assert sum(b.studies for b in result.bins) == 304
    assert result.brier == pytest.approx(np.mean((probabilities - truth) ** 2))
    weights = np.array([b.studies for b in result.bins]) / 304
    assert result.expected_error == pytest.approx((weights * np.abs(share - mean)).sum())


def test_temperature_undoes_an_overconfidence_of_three():
    rng = np.random.default_rng(7)
    true_probability = rng.uniform(0.02, 0.98, 20000)
    truth = (rng.random(20000) < true_probability).astype(int)
    logits = 3 * logit(true_probability)
    temperature = fit_temperature(truth, logits)
    assert temperature == pytest.approx(3, rel=0.05)
    assert calibration(truth, expit(logits / temperature)).expected_error < 0.02
    assert calibration(truth, expit(logits)).expected_error > 0.08


@pytest.mark.parametrize(
    ("truth", "scores"),
    [([0, 1], [0.1, 0.2]), ([0, 0, 1, 1], [0, 1, np.nan, 1]), ([0, 0, 1, 2], [0, 1, 1, 1]), ([0, 0, 1, 1], [1, 2, 3])],
)
def test_what_no_interval_can_be_computed_of_is_refused(truth, scores):
    with pytest.raises(ValueError, match=r"studies|study|finite"):
        auc(truth, scores)


def test_the_mean_auc_of_runs_varies_as_the_bootstrap_over_studies_says():
    rng = np.random.default_rng(3)
    truth = np.repeat([0, 1], 60)
    runs = rng.normal(0, 1, (3, 120)) + truth + rng.normal(0, 1, 120)
    other = rng.normal(0, 1, (3, 120)) + 0.4 * truth
    samples = []
    for _ in range(600):
        chosen = np.concatenate([rng.integers(0, 60, 60), rng.integers(60, 120, 60)])
        samples.append(
            [np.mean([roc_auc_score(truth[chosen], run[chosen]) for run in group]) for group in (runs, other)]
        )
    samples = np.array(samples)
    found, difference = auc(truth, runs), compare_aucs(truth, runs, other)
    assert found.value == pytest.approx(np.mean([roc_auc_score(truth, run) for run in runs]))
    assert found.variance**0.5 == pytest.approx(samples[:, 0].std(), rel=0.15)
    spread = (difference.high - difference.low) / 2 / 1.96
    assert spread == pytest.approx((samples[:, 0] - samples[:, 1]).std(), rel=0.15)


def clustered_scores(
    rng: np.random.Generator, patients: int, within: float
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A pair of each patient, with and without embolism, whose scores share a part."""
    shared = rng.normal(size=(patients, 1)) * within**0.5
    scores = shared + rng.normal(size=(patients, 2)) * (1 - within) ** 0.5 + np.array([1.0, 0.0])
    return np.tile([1, 0], patients), scores.ravel(), [str(k) for k in range(patients) for _ in range(2)]


def test_with_a_patient_for_each_study_the_variance_is_that_of_delong():
    rng = np.random.default_rng(0)
    truth, scores, _ = clustered_scores(rng, 40, 0.5)
    alone = [str(k) for k in range(80)]
    other = scores + rng.normal(size=80)
    assert auc(truth, scores, patients=alone).variance == pytest.approx(auc(truth, scores).variance, rel=1e-9)
    assert compare_aucs(truth, scores, other, patients=alone).p_value == pytest.approx(
        compare_aucs(truth, scores, other).p_value, rel=1e-9
    )


@pytest.mark.parametrize("within", [0.0, 0.7])
def test_pairs_of_one_patient_have_the_variance_that_repeating_the_experiment_shows(within):
    rng = np.random.default_rng(1)
    drawn = [clustered_scores(rng, 50, within) for _ in range(600)]
    found = [auc(truth, scores, patients=patients) for truth, scores, patients in drawn]
    expected = np.var([one.value for one in found])
    assert np.mean([one.variance for one in found]) == pytest.approx(expected, rel=0.15)
    if within:  # pairs are compared with themselves: DeLong believes them far apart
        assert np.mean([auc(truth, scores).variance for truth, scores, _ in drawn]) > 1.4 * expected


def test_several_studies_of_a_patient_widen_the_interval():
    rng = np.random.default_rng(2)
    truth = np.repeat(np.tile([1, 0], 15), 6)
    scores = np.repeat(rng.normal(size=30) + np.tile([1.0, 0.0], 15), 6) + 0.1 * rng.normal(size=180)
    patients = [str(k) for k in range(30) for _ in range(6)]
    assert auc(truth, scores, patients=patients).variance > 4 * auc(truth, scores).variance


def test_one_patient_alone_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 patients"):
        auc([1, 1, 0, 0], [0.9, 0.8, 0.3, 0.85], patients=["a"] * 4)
