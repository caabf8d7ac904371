"""Slabs against two plain interpolations, and the way back to the patient against painted voxels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pe_app.common.errors import InputError
from pe_app.ct.lungs import SliceRange
from pe_app.ct.slabs import SlabConfig, attention_target, crop_plane, slab_at, study_slabs
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


def striped_body(pixel_mm: float, matrix: int, middle: tuple[float, float]) -> Volume:
    """A round body of 40 HU and 60 mm radius, round ``middle`` (mm), with a bright rod 20 mm to the left of it."""
    row, column = np.meshgrid(*[np.arange(matrix) * pixel_mm] * 2, indexing="ij")
    away = np.hypot(row - middle[0], column - middle[1])
    plane = np.where(away < 60, 40, -1000)
    plane[np.hypot(row - middle[0], column - middle[1] + 20) < 4] = 400
    voxels = np.broadcast_to(plane, (30, matrix, matrix)).astype(np.int16)
    return Volume(voxels, axial_affine((2.5, pixel_mm, pixel_mm), (0.0, 0.0, 0.0)))


@pytest.mark.parametrize(("pixel_mm", "matrix", "middle"), [(0.5, 400, (100, 100)), (1.0, 220, (90, 130))])
def test_with_a_pixel_size_the_same_body_fills_the_same_pixels_wherever_it_lies(pixel_mm, matrix, middle):
    config = SlabConfig(crop=192, pixel_mm=1.0, slab_spacing="physical")
    volume = striped_body(pixel_mm, matrix, middle)
    slab = slab_at(volume, 15, config)
    hu = slab[2] * 1524 - 1024
    assert np.count_nonzero(hu > -400) == pytest.approx(np.pi * 60**2, rel=0.02)
    rod = np.argwhere(hu > 250)
    np.testing.assert_allclose(rod.mean(0), (95.5, 75.5), atol=1.5)
    np.testing.assert_allclose(hu[0], -1000, atol=30)  # beyond the image is air

    slabs = study_slabs(volume, SliceRange(3, 26), config)
    cells = slabs.pixels[:, 2].reshape(50, 12, 16, 12, 16).max((2, 4))
    found = slabs.to_volume(cells).to_lps_mm(np.unravel_index(cells.argmax(), cells.shape))
    assert np.abs(found[:2] - np.array([middle[1] - 20, middle[0]])).max() <= 8 + 4 + 1


def test_the_target_of_a_mask_follows_the_crop_of_a_pixel_size():
    config = SlabConfig(crop=192, pixel_mm=1.0)
    volume = striped_body(0.5, 400, (100, 100))
    mask = np.zeros((400, 400), np.uint8)
    mask[196:205, 156:165] = 1  # where the rod is
    target = attention_target(mask, config, crop_plane(volume, config))
    assert {(int(row), int(column)) for row, column in np.argwhere(target)} <= {(5, 4), (6, 4), (5, 5), (6, 5)}
    with pytest.raises(ValueError, match="crop_plane"):
        attention_target(mask, config)


def test_fine_pixels_are_averaged_and_coarse_ones_interpolated():
    rng = np.random.default_rng(0)
    voxels = np.full((30, 300, 300), 40, np.int16) + rng.integers(-200, 200, (30, 300, 300)).astype(np.int16)
    volume = Volume(voxels, axial_affine((2.5, 0.5, 0.5), (0.0, 0.0, 0.0)))
    config = SlabConfig(crop=64, pixel_mm=1.0)
    slab = slab_at(volume, 15, config)[2] * 1524 - 1024
    # weights 1/8, 3/8, 3/8, 1/8 leave 20/64 of the variance in each direction, 1/4, 1/2, 1/4 leave 24/64
    assert 0.97 * 20 / 64 < slab.std() / voxels.std() < 1.03 * 24 / 64


@pytest.mark.parametrize("pixel_mm", [0.0, -1.0, float("nan"), 50.0])
def test_no_pixel_has_such_a_size(pixel_mm):
    with pytest.raises(ValueError, match="pixel_mm"):
        SlabConfig(pixel_mm=pixel_mm)
