"""Where attention lies, against hand-made maps and brute force over voxels."""

import numpy as np
import pytest

from pe_app.ct.volume import Volume, axial_affine
from pe_app.evaluation.localisation import (
    CandidateOutcome,
    CellTruth,
    cell_truth,
    centred_gaussian,
    energy_inside,
    froc,
    key_slice_hit,
    map_mass,
    match_candidates,
    mean_mask,
    number_emboli,
    pointing_game,
    pointing_slabs,
)


def ct_and_grid(slices: int = 20, ct_step: float = 2.0, slab_step: float = 5.0) -> tuple[Volume, Volume]:
    """A mask of 64 x 64 pixels of 0.7 mm and an attention grid of 4 x 4 cells of 16 pixels, as a slab has."""
    mask = Volume(np.zeros((slices, 64, 64), np.uint8), axial_affine((ct_step, 0.7, 0.7), (-9, 4, 100)), "mask")
    corner = mask.to_lps_mm((0, 7.5, 7.5))
    corner[2] = 100 + 1.3
    grid = Volume(np.zeros((8, 4, 4), np.float32), axial_affine((slab_step, 11.2, 11.2), tuple(corner)), "attention")
    return mask, grid


def cells_by_sampling(attention: Volume, mask: Volume) -> np.ndarray:
    """Brute force: 9 x 9 x 9 points in every mask voxel, each thrown into the cell that holds it."""
    cells = np.zeros(attention.shape, bool)
    inside = np.linspace(-0.499, 0.499, 9)
    offsets = np.array(np.meshgrid(inside, inside, inside)).reshape(3, -1).T
    for voxel in np.argwhere(mask.voxels > 0):
        index = np.rint(attention.to_index(mask.to_lps_mm(voxel + offsets))).astype(int)
        index = index[((index >= 0) & (index < attention.shape)).all(1)]
        cells[tuple(index.T)] = True
    return cells


@pytest.mark.parametrize("ct_step", [0.7, 2.0, 6.0])
def test_a_cell_is_embolism_where_it_holds_any_piece_of_the_mask(ct_step):
    mask, grid = ct_and_grid(ct_step=ct_step, slices=8)
    rng = np.random.default_rng(0)
    mask.voxels[tuple(rng.integers(0, n, 6) for n in mask.shape)] = 1
    truth = cell_truth(grid, mask)
    assert np.array_equal(truth.embolism, cells_by_sampling(grid, mask))


def test_one_voxel_is_never_lost():
    mask, grid = ct_and_grid()
    for voxel in ((0, 0, 0), (7, 15, 16), (19, 63, 63)):
        mask.voxels[:] = 0
        mask.voxels[voxel] = 1
        assert cell_truth(grid, mask).embolism.any()


def test_slices_that_nobody_reviewed_are_not_judged():
    mask, grid = ct_and_grid()
    mask.voxels[3:12, 20:30, 20:30] = 1
    truth = cell_truth(grid, mask, reviewed_slices=(4, 18))
    slab_of_slice = np.rint(grid.to_index(mask.to_lps_mm([(4, 0, 0), (18, 0, 0)]))[:, 0]).astype(int)
    assert set(slab_of_slice) <= set(np.flatnonzero(truth.judged))
    assert truth.judged.sum() < 5
    assert not truth.positive_slabs[~truth.judged].any()
    maps = np.zeros(grid.shape)
    maps[~truth.judged] = 1.0
    maps[slab_of_slice[0], 1, 1] = 0.5
    assert pointing_game(maps, truth) == 1


def test_grids_that_are_turned_against_each_other_are_refused():
    mask, grid = ct_and_grid()
    turned = grid.affine.copy()
    turned[1, 0] = 2.0
    with pytest.raises(ValueError, match="not parallel"):
        cell_truth(Volume(grid.voxels, turned), mask)


def truth_of(cells: list[tuple[int, int, int]], shape=(6, 4, 4)) -> CellTruth:
    embolism = np.zeros(shape, bool)
    embolism[tuple(np.array(cells).T)] = True
    return CellTruth(embolism, np.ones(shape[0], bool))


def test_pointing_finds_the_maximum_in_the_mask_and_not_beside_it():
    truth = truth_of([(2, 1, 1), (4, 3, 0)])
    maps = np.full((6, 4, 4), 0.1)
    maps[2, 1, 1], maps[4, 3, 1] = 0.8, 0.9
    assert pointing_game(maps, truth) == 0
    assert pointing_slabs(maps, truth).tolist() == [1, 0]
    maps[2, 1, 1] = 0.95
    assert pointing_game(maps, truth) == 1


def test_a_flat_map_points_as_well_as_guessing_and_an_empty_one_never():
    truth = truth_of([(2, 1, 1), (2, 1, 2), (4, 3, 0)])
    assert pointing_game(np.ones((6, 4, 4)), truth) == pytest.approx(3 / 96)
    assert pointing_slabs(np.ones((6, 4, 4)), truth) == pytest.approx([2 / 16, 1 / 16])
    assert pointing_game(np.zeros((6, 4, 4)), truth) == 0


def test_energy_is_the_share_of_the_attention_in_the_mask_of_positive_slabs():
    truth = truth_of([(0, 0, 0), (3, 2, 2), (5, 1, 1)])
    maps = np.zeros((6, 4, 4))
    maps[0, 0, 0], maps[0, 1, 1], maps[3, 2, 2], maps[1] = 3, 1, 0.2, 9
    assert energy_inside(maps, truth) == pytest.approx([0.75, 1.0, 0.0])


def test_a_key_slice_may_be_one_slab_off_but_not_two():
    truth = truth_of([(3, 0, 0)])
    assert key_slice_hit(np.array([0, 0, 1.0, 0, 0, 0]), truth, 1)
    assert not key_slice_hit(np.array([0, 1.0, 0, 0, 0, 0]), truth, 1)
    assert key_slice_hit(np.array([0.2, 1.0, 0, 0, 0.3, 0]), truth, 2)
    assert not key_slice_hit(np.array([0.3, 1.0, 0, 0, 0.2, 0]), truth, 2)


def test_baselines_look_at_the_middle_and_where_emboli_were():
    gaussian = centred_gaussian((50, 24, 24))
    assert gaussian.shape == (50, 24, 24)
    assert np.allclose(gaussian, gaussian[::-1, ::-1, ::-1])
    assert gaussian[25, 12, 12] == gaussian.max()
    assert gaussian[25, 12, 12 + 6] / gaussian[25, 12, 12] == pytest.approx(np.exp(-0.5 * (6.5**2 - 0.5**2) / 36))
    mean = mean_mask([truth_of([(2, 1, 1)]), truth_of([(2, 1, 1), (0, 0, 0)])])
    assert (mean[2, 1, 1], mean[0, 0, 0], mean.sum()) == (1, 0.5, 1.5)
    assert map_mass(np.full((2, 2, 2), 0.25)) == 0.25


def test_touching_voxels_are_one_embolus_and_separate_ones_two():
    mask, _ = ct_and_grid()
    mask.voxels[3, 10, 10] = mask.voxels[4, 11, 11] = mask.voxels[9, 40, 40] = 1
    assert number_emboli(mask).voxels.max() == 2


@pytest.mark.parametrize(("distance_mm", "expected"), [(0, [True, False]), (2, [True, False]), (5, [True, True])])
def test_a_candidate_hits_within_the_distance(distance_mm, expected):
    mask, _ = ct_and_grid()
    mask.voxels[5, 10:20, 10:20] = 1
    mask.voxels[15, 40:50, 40:50] = 2
    inside = mask.to_lps_mm((5.4, 15.0, 15.0))
    beside = mask.to_lps_mm((15, 45, 49.5)) + np.array([4.0, 0, 0])  # 4 mm to the left of the last column's face
    far = mask.to_lps_mm((0, 0, 60))
    outcome = match_candidates(np.stack([inside, beside, far]), np.array([0.9, 0.7, 0.5]), mask, distance_mm)
    assert (outcome.embolus_scores > -np.inf).tolist() == expected
    assert sorted(outcome.false_scores) == ([0.5] if expected[1] else [0.5, 0.7])


def test_a_negative_study_has_only_false_candidates():
    mask, _ = ct_and_grid()
    outcome = match_candidates(np.array([[0.0, 10.0, 110.0]]), np.array([0.4]), mask)
    assert outcome.embolus_scores.size == 0
    assert outcome.false_scores.tolist() == [0.4]


def froc_by_thresholds(outcomes, rate):
    """Brute force over all thresholds."""
    thresholds = np.concatenate([np.concatenate([o.embolus_scores, o.false_scores]) for o in outcomes])
    emboli = sum(len(o.embolus_scores) for o in outcomes)
    best = 0.0
    for threshold in thresholds[np.isfinite(thresholds)]:
        if sum((o.false_scores >= threshold).sum() for o in outcomes) <= rate * len(outcomes):
            best = max(best, sum((o.embolus_scores >= threshold).sum() for o in outcomes) / emboli)
    return best


@pytest.mark.parametrize("decimals", [1, 6])
def test_froc_is_the_best_of_all_thresholds(decimals):
    rng = np.random.default_rng(3)
    outcomes = []
    for _ in range(25):
        found = np.round(rng.random(rng.integers(0, 4)) + 0.3, decimals)
        found[rng.random(found.shape) < 0.2] = -np.inf
        outcomes.append(CandidateOutcome(found, np.round(rng.random(rng.integers(0, 8)), decimals)))
    points = froc(outcomes, resamples=200)
    assert [p.false_per_study for p in points] == [0.5, 1, 2, 4]
    for point in points:
        assert point.sensitivity == pytest.approx(froc_by_thresholds(outcomes, point.false_per_study))
        assert point.low <= point.sensitivity <= point.high
    assert froc(outcomes, resamples=200) == points


def test_bootstrap_over_studies_is_wider_than_over_emboli_of_one_patient_alike():
    alone = [CandidateOutcome(np.array([1.0 if k % 2 else -np.inf]), np.empty(0)) for k in range(40)]
    alike = [CandidateOutcome(np.full(10, 1.0 if k % 2 else -np.inf), np.empty(0)) for k in range(4)]
    narrow, wide = froc(alone, (1,))[0], froc(alike, (1,))[0]
    assert narrow.sensitivity == wide.sensitivity == 0.5
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
