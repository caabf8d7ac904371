"""The detection's JSON contract, and candidates against hand-made maps."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pe_app.common.errors import InputError
from pe_app.ct.quality import Reason
from pe_app.ct.volume import Volume, axial_affine
from pe_app.model.detection import (
    Detection,
    Evidence,
    ImageIdentity,
    ModelIdentity,
    candidate_regions,
    estimate_extent,
    find_candidates,
)

GRID = axial_affine((6.0, 11.0, 10.0), (-120.0, -130.0, -300.0))


def grid_of(maps: np.ndarray) -> Volume:
    return Volume(maps, GRID)


def example(**changes: object) -> Detection:
    fields: dict[str, object] = {
        "status": "analysed",
        "reasons": (Reason("demo_model", "never saw a real embolism", refuses=False),),
        "probability": 0.73,
        "threshold": 0.5,
        "evidence": (Evidence(0, -300.0, 2, 0.8, 1.25, (1.0, 2.0, -300.0)), Evidence(1, -294.0, 4, 0.1, 0.0, None)),
        "candidates": (),
        "image": ImageIdentity((40, 64, 64), (2.5, 0.8, 0.8), "ab" * 32),
        "model": ModelIdentity("starter", "1", "cd" * 32, trained=True),
        "seconds": {"encode": 1.5},
    }
    return Detection(**{**fields, **changes})


def test_json_holds_every_field_of_the_schema():
    payload = example().to_json()
    assert payload["schema"] == "pe-detection/2"
    assert set(payload) >= {
        *("status", "reasons", "probability", "threshold", "positive", "evidence", "candidates", "image", "model"),
        *("seconds", "extent_estimate"),
    }
    assert set(payload["evidence"][0]) == {
        *("slab", "z_mm", "slice_index", "probability", "attention_peak", "peak_lps_mm"),
    }
    assert payload["positive"] is True
    assert payload["image"]["size"] == [40, 64, 64]


def test_json_survives_the_way_through_a_file():
    maps = np.eye(3)[None] * 0.9
    detection = example(
        candidates=find_candidates(maps, np.array([0.9]), grid_of(maps), [7]),
        extent_estimate=estimate_extent(maps, np.array([0.9]), grid_of(maps)),
    )
    assert Detection.from_json(json.loads(json.dumps(detection.to_json(), allow_nan=False))) == detection


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_never_leaves(number):
    with pytest.raises(ValueError, match="not finite"):
        example(probability=number).to_json()


def test_numpy_numbers_become_plain_ones():
    payload = example(probability=np.float32(0.25), seconds={"encode": np.float64(1)}).to_json()
    assert type(payload["probability"]) is float
    json.dumps(payload)


def test_a_refused_study_has_no_probability_and_is_neither_positive_nor_negative():
    payload = example(status="refused", probability=None, evidence=(), candidates=()).to_json()
    assert payload["probability"] is None
    assert payload["positive"] is None


def test_probability_at_the_threshold_is_positive():
    assert example(probability=0.5).positive
    assert not example(probability=0.4999).positive


def test_a_file_of_schema_1_is_still_read_without_sizes_places_and_extent():
    maps = np.eye(3)[None] * 0.9
    payload = example(candidates=find_candidates(maps, np.array([0.9]), grid_of(maps), [7])).to_json()
    del payload["extent_estimate"]
    for added in ("size_mm", "slices", "volume_ml", "side", "level"):
        del payload["candidates"][0][added]
    old = Detection.from_json({**payload, "schema": "pe-detection/1"})
    assert old.extent_estimate is None
    assert (old.candidates[0].size_mm, old.candidates[0].slices, old.candidates[0].place) == (None, None, "")
    assert old.probability == 0.73


@pytest.mark.parametrize("broken", [{}, {"schema": "pe-detection/3"}, {"schema": "pe-annotation/2"}])
def test_another_schema_is_refused(broken):
    with pytest.raises(InputError, match="pe-detection/2"):
        Detection.from_json(broken)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("status",), "banana", "detection: status must be 'analysed' or 'refused', got 'banana'"),
        (("probability",), "high", "probability must be a valid number, got 'high'"),
        (("evidence", 1, "z_mm"), "nowhere", "entry 2 of evidence: z_mm must be a valid number, got 'nowhere'"),
        (("reasons", 0, "refuses"), "no", "entry 1 of reasons: refuses must be a valid boolean, got 'no'"),
        (("image", "size"), [40, 64], "entry 3 of image.size is missing"),
        (("evidence", 0, "peak_lps_mm"), [1, 2, float("inf")], "entry 3 of entry 1 of evidence: peak_lps_mm must be a"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(place, value, message):
    payload = example().to_json()
    *way, last = place
    part = payload
    for step in way:
        part = part[step]
    part[last] = value
    with pytest.raises(InputError, match=message):
        Detection.from_json(payload)


def test_what_a_newer_minor_version_adds_is_ignored():
    payload = {**example().to_json(), "schema": "pe-detection/2.3", "burden_ml": 3}
    assert Detection.from_json(payload) == example()


def test_two_apart_regions_are_two_candidates_ranked_by_peak_times_slab_probability():
    maps = np.zeros((10, 8, 8))
    maps[2, 1, 1] = maps[2, 1, 2] = 1.0
    maps[7, 6, 6] = 1.0
    probability = np.linspace(0.5, 0.95, 10)
    first, second = find_candidates(maps, probability, grid_of(maps), range(0, 40, 4))
    assert (first.rank, second.rank) == (1, 2)
    assert first.centre_lps_mm == pytest.approx((-120 + 60, -130 + 66, -300 + 42))
    assert (first.slice_index, second.slice_index) == (28, 8)
    assert second.extent_mm == pytest.approx((20, 11, 6))  # two cells left-right, one front-back, one slab
    assert second.slab_probability == pytest.approx(probability[2])
    assert second.size_mm == pytest.approx(20)
    assert second.slices == (8, 8)
    assert second.volume_ml == pytest.approx(2 * 10 * 11 * 6 / 1000)


def test_a_candidate_over_several_slabs_names_its_lowest_and_highest_slice():
    maps = np.zeros((10, 4, 4))
    maps[3:6, 2, 2] = 1.0
    (found,) = find_candidates(maps, np.ones(10), grid_of(maps), range(0, 40, 4))
    assert found.slices == (12, 20)
    assert found.size_mm == pytest.approx(18)  # three slabs of 6 mm, longer than its cells are wide


def test_the_extent_estimate_is_the_volume_of_strong_cells_and_the_share_of_slabs_that_hold_one():
    maps = np.zeros((10, 8, 8))
    maps[2, 1, 1:4] = maps[7, 6, 6] = 1.0
    maps[8] = 1.0  # a quiet slab: its own map counts for nothing
    probability = np.where(np.arange(10) == 8, 0.1, 0.9)
    extent = estimate_extent(maps, probability, grid_of(maps))
    assert extent.volume_ml == pytest.approx(4 * 10 * 11 * 6 / 1000)
    assert extent.slab_share == pytest.approx(0.2)


def test_quiet_slabs_give_no_candidate_however_bright_their_own_map():
    maps = np.ones((4, 6, 6))
    assert find_candidates(maps, np.full(4, 0.1), grid_of(maps), range(4)) == ()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_candidates_are_the_connected_regions_that_flood_filling_finds(seed):
    rng = np.random.default_rng(seed)
    maps = np.where(rng.random((5, 6, 6)) > 0.9, rng.uniform(0.4, 1, (5, 6, 6)), 0)
    open_cells = set(map(tuple, np.argwhere(maps >= 0.5)))
    peaks = []
    while open_cells:
        region, frontier = [], [open_cells.pop()]
        while frontier:
            cell = frontier.pop()
            region.append(cell)
            near = [other for other in open_cells if max(abs(a - b) for a, b in zip(cell, other, strict=True)) <= 1]
            open_cells -= set(near)
            frontier += near
        peaks.append(max(maps[cell] for cell in region))
    small = Volume(maps, grid_of(maps).affine @ np.diag([0.1, 0.1, 0.1, 1.0]))  # nowhere 20 mm wide
    found = find_candidates(maps, np.ones(5), small, range(5))
    assert [candidate.peak for candidate in found] == pytest.approx(sorted(peaks, reverse=True)[:20])


def test_a_long_region_with_two_peaks_is_two_candidates_each_at_its_own():
    maps = np.zeros((10, 8, 8))
    maps[:, 4, 4] = [0.7, 0.9, 0.7, 0.6, 0.55, 0.55, 0.6, 0.7, 1.0, 0.7]  # 6 mm a slab: the peaks lie 42 mm apart
    first, second = find_candidates(maps, np.ones(10), grid_of(maps), range(10))
    assert (first.slice_index, second.slice_index) == (8, 1)
    assert first.z_mm - second.z_mm == pytest.approx(42)
    assert abs(first.centre_lps_mm[2] - first.z_mm) < 12
    assert first.slices == (5, 9)
    assert second.slices == (0, 4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_shared_out_regions_cover_the_same_cells_with_peaks_far_apart(seed):
    rng = np.random.default_rng(seed)
    maps = ndimage.gaussian_filter(rng.random((12, 10, 10)), 1)
    maps /= maps.max()
    ranks = candidate_regions(maps, (6.0, 11.0, 11.0), 0.9)
    assert ((ranks > 0) == (maps >= 0.9)).all() or ranks.max() == 20
    regions, _ = ndimage.label(maps >= 0.9, np.ones((3, 3, 3)))
    peaks = [
        np.unravel_index(np.where(ranks == rank, maps, 0).argmax(), maps.shape) for rank in range(1, ranks.max() + 1)
    ]
    for one, other in itertools.combinations(peaks, 2):
        if regions[one] == regions[other]:
            assert np.linalg.norm((np.array(one) - other) * (6, 11, 11)) > 20
