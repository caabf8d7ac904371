"""Slabs against two plain interpolations, and the way back to the patient against painted voxels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pe_app.common.errors import InputError
from pe_app.ct.lungs import SliceRange
from pe_app.ct.slabs import SlabConfig, attention_target, slab_at, study_slabs
from pe_app.ct.volume import Volume, axial_affine

SMALL = SlabConfig(matrix=64, crop=48)


def random_volume(slices: int = 40, spacing_mm: float = 1.7, matrix: int = 64) -> Volume:
    voxels = np.random.default_rng(0).integers(-1024, 500, (slices, matrix, matrix)).astype(np.int16)
    return Volume(voxels, axial_affine((spacing_mm, 0.8, 0.8), (-25.0, -30.0, -400.0)))


def two_step_slices(volume: Volume, lung: SliceRange, config: SlabConfig) -> np.ndarray:
    """The textbook way: the volume to 2.5 mm, cut to the lung, the lung to 200 slices, window."""
    step = config.spacing_mm / volume.spacing_mm[0]
    grid = np.arange(0, volume.shape[0] - 1 + 1e-9, step)
    columns = volume.voxels.reshape(volume.shape[0], -1).astype(float).T
    resampled = np.array([np.interp(grid, np.arange(volume.shape[0]), column) for column in columns]).T
    kept = resampled[round(lung.first / step) : round(lung.last / step) + 1]
    places = (np.arange(200) + 0.5) * len(kept) / 200 - 0.5
    resized = np.array([np.interp(places, np.arange(len(kept)), column) for column in kept.T]).T
    windowed = (np.clip(resized, -1024, 500) + 1024) / 1524
    margin = (config.matrix - config.crop) // 2
    return windowed.reshape(200, *volume.shape[1:])[:, margin:-margin, margin:-margin]


def test_study_slabs_equal_the_two_interpolations_of_the_paper_done_one_after_the_other():
    volume, lung = random_volume(), SliceRange(4, 33)
    slices = two_step_slices(volume, lung, SMALL)
    pixels = study_slabs(volume, lung, SMALL).pixels
    assert pixels.shape == (50, 5, 48, 48)
    for slab in range(49):
        np.testing.assert_allclose(pixels[slab], slices[4 * slab : 4 * slab + 5], atol=2e-6)
    np.testing.assert_allclose(pixels[49, :4], slices[196:], atol=2e-6)
    np.testing.assert_array_equal(pixels[49, 4], pixels[49, 3])


def test_slabs_run_from_the_feet_to_the_head_and_span_the_lung():
    volume, lung = random_volume(), SliceRange(4, 33)
    slabs = study_slabs(volume, lung, SMALL)
    length = np.ptp(volume.slice_z_mm[[4, 33]])
    assert (np.diff(slabs.z_mm) > 0).all()
    assert np.ptp(slabs.z_mm) == pytest.approx(length * 49 / 50, abs=3.0)  # 50 slab centres over the lung range
    nearest = np.abs(volume.slice_z_mm[:, None] - slabs.z_mm).argmin(axis=0)
    np.testing.assert_array_equal(slabs.slice_index, nearest)


def test_physical_slabs_are_2_5_mm_apart_round_the_same_positions():
    volume, lung = random_volume(), SliceRange(4, 33)
    physical = study_slabs(volume, lung, SlabConfig(matrix=64, crop=48, slab_spacing="physical"))
    np.testing.assert_allclose(physical.z_mm, study_slabs(volume, lung, SMALL).z_mm)
    wanted_mm = physical.z_mm[20] + np.arange(-2, 3) * 2.5
    columns = volume.voxels[:, 8:-8, 8:-8].reshape(volume.shape[0], -1).astype(float).T
    expected = np.array([np.interp(wanted_mm, volume.slice_z_mm, column) for column in columns]).T
    np.testing.assert_allclose(physical.pixels[20].reshape(5, -1), (expected + 1024) / 1524, atol=2e-6)


def test_the_annotated_slice_is_exactly_the_middle_of_its_slab():
    volume = random_volume()
    slab = slab_at(volume, 17, SMALL)
    np.testing.assert_allclose(slab[2], (volume.voxels[17, 8:-8, 8:-8] + 1024.0) / 1524, atol=1e-6)


def test_other_matrices_keep_their_field_of_view():
    ramp = np.broadcast_to(np.linspace(-1000, 400, 96), (40, 96, 96)).astype(np.int16)
    volume = Volume(ramp, axial_affine((2.5, 0.5, 0.5)))
    slab = slab_at(volume, 20, SMALL)
    places = (np.arange(8, 56) + 0.5) * 96 / 64 - 0.5  # centres of the 64 wider pixels, extents preserved
    expected = (np.interp(places, np.arange(96), ramp[0, 0]) + 1024) / 1524
    np.testing.assert_allclose(slab[2, 10], expected, atol=2e-3)


def oblique_affine() -> np.ndarray:
    """Anisotropic, turned about two axes."""
    a, b = np.deg2rad(11), np.deg2rad(-7)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    affine = axial_affine((1.3, 0.9, 0.7), (12.0, -80.0, -250.0))
    affine[:3, :3] = about_x @ about_y @ affine[:3, :3]
    return affine


@pytest.mark.parametrize("slab_spacing", ["lung", "physical"])
@pytest.mark.parametrize(("matrix", "affine"), [(64, oblique_affine()), (96, oblique_affine())])
def test_a_painted_voxel_and_its_cell_land_on_the_same_millimetre(slab_spacing, matrix, affine):
    config = SlabConfig(matrix=64, crop=48, slab_spacing=slab_spacing)
    rng = np.random.default_rng(3)
    for _ in range(5):
        voxels = np.full((60, matrix, matrix), -1024, np.int16)
        place = rng.integers((12, matrix // 4, matrix // 4), (48, 3 * matrix // 4, 3 * matrix // 4))
        voxels[tuple(place)] = 500
        volume = Volume(voxels, affine)
        slabs = study_slabs(volume, SliceRange(3, 56), config)
        # brute force: the cell whose 16 x 16 pixels of the middle slice, or its neighbours, are brightest
        weights = np.array([1, 2, 3, 2, 1])[None, :, None, None]
        cells = (slabs.pixels * weights).reshape(50, 5, 3, 16, 3, 16).sum(axis=(1, 3, 5))
        found = slabs.to_volume(cells).to_lps_mm(np.unravel_index(cells.argmax(), cells.shape))
        truth = volume.to_lps_mm(place)
        # half a cell in plane, half a slab (and the reach of linear interpolation) along the slices
        allowed = np.linalg.inv(affine[:3, :3]) @ (found - truth)
        pixel = matrix / 64
        assert np.abs(allowed[1:]).max() <= 8 * pixel + 0.51
        assert abs(allowed[0]) * 1.3 <= 54 * 1.3 / 50 / 2 + 2.5


@settings(max_examples=60, deadline=None)
@given(row=st.integers(64, 447), column=st.integers(64, 447))
def test_an_embolus_of_one_pixel_never_vanishes_from_the_target(row, column):
    mask = np.zeros((512, 512), np.uint8)
    mask[row, column] = 1
    target = attention_target(mask, SlabConfig())
    assert target[(row - 64) // 16, (column - 64) // 16] == 1
    assert 1 <= target.sum() <= 9


def test_a_mask_outside_the_crop_gives_an_empty_target():
    mask = np.zeros((512, 512), np.uint8)
    mask[10, 10] = 1
    assert attention_target(mask, SlabConfig()).sum() == 0


def test_a_lung_shorter_than_a_slab_is_refused_with_its_slices():
    with pytest.raises(InputError, match="CT slices 4 to 6"):
        study_slabs(random_volume(), SliceRange(4, 6), SMALL)


def test_a_slice_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="the slices are 0 to 39"):
        slab_at(random_volume(), 40, SMALL)


COUNTS = ({"slab_count": 10**9}, {"slab_count": 0}, {"slab_stride": -1}, {"slices_per_slab": 10**5 + 1})
SIZES = ({"matrix": 10**6}, {"spacing_mm": 0.0}, {"spacing_mm": float("nan")}, {"spacing_mm": 1e9})


@pytest.mark.parametrize("window", [(500, -1024), (40, 40), (float("nan"), 500), (-1024, float("inf"))], ids=str)
def test_a_window_without_values_between_its_ends_is_refused(window):
    with pytest.raises(ValueError, match="from a lower to a higher"):
        SlabConfig(hu_window=window)


@pytest.mark.parametrize("size", [*COUNTS, *SIZES], ids=str)
def test_settings_of_a_damaged_or_hostile_model_are_refused(size):
    with pytest.raises(ValueError, match="no study needs"):
        SlabConfig(**size)
