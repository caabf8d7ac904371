"""Volume against nibabel's affines and orientations, which share no code with it."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from pe_app.ct.volume import Volume, axial_affine, canonical_volume

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""LPS to RAS and back."""


def rotation(degrees_x: float, degrees_z: float) -> np.ndarray:
    x, z = np.radians([degrees_x, degrees_z])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return about_x @ about_z


def oblique_volume() -> Volume:
    affine = axial_affine((2.5, 0.8, 0.7), (-100.0, -120.0, -300.0))
    affine[:3, :3] = rotation(12, 7) @ affine[:3, :3]
    return Volume(np.random.default_rng(0).integers(-1000, 400, (6, 5, 4)).astype(np.int16), affine)


def test_positions_are_those_of_nibabel_on_the_same_affine():
    volume = oblique_volume()
    index = np.random.default_rng(1).uniform(-3, 8, (20, 3))
    expected = nib.affines.apply_affine(RAS @ volume.affine, index) * (-1, -1, 1)
    np.testing.assert_allclose(volume.to_lps_mm(index), expected, atol=1e-9)


def test_index_of_a_position_is_the_index_it_came_from():
    volume = oblique_volume()
    index = np.random.default_rng(2).uniform(-3, 8, (4, 5, 3))
    np.testing.assert_allclose(volume.to_index(volume.to_lps_mm(index)), index, atol=1e-9)


def test_spacing_of_an_oblique_volume_is_that_of_nibabel():
    volume = oblique_volume()
    np.testing.assert_allclose(volume.spacing_mm, nib.affines.voxel_sizes(volume.affine))
    np.testing.assert_allclose(volume.spacing_mm, (2.5, 0.8, 0.7))


def test_slice_z_is_that_of_the_middle_of_the_slice():
    volume = oblique_volume()
    middle = np.array([[k, (5 - 1) / 2, (4 - 1) / 2] for k in range(6)])
    np.testing.assert_allclose(volume.slice_z_mm, nib.affines.apply_affine(volume.affine, middle)[:, 2])


def test_nearest_slice_stays_within_the_volume():
    volume = Volume(np.zeros((4, 2, 2), np.int16), axial_affine((2.5, 1, 1), (0, 0, -10)))
    assert [volume.nearest_slice(z) for z in (-99, -10, -6.3, -6.2, 99)] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("flips", list(product((1, -1), repeat=3)))
def test_any_order_of_axes_becomes_the_array_that_nibabel_reorients_to(order, flips):
    rng = np.random.default_rng(3)
    voxels = rng.integers(-1000, 400, (3, 4, 5)).astype(np.int16)
    turn = np.zeros((3, 3))
    turn[list(order), range(3)] = flips
    affine = np.eye(4)
    affine[:3, :3] = rotation(9, -14) @ turn @ np.diag([0.7, 0.8, 2.5])
    affine[:3, 3] = rng.uniform(-100, 100, 3)

    volume = canonical_volume(voxels, affine)

    image = nib.Nifti1Image(voxels, RAS @ affine)
    to_lps = nib.orientations.axcodes2ornt("LPS")
    reoriented = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), to_lps))
    np.testing.assert_array_equal(volume.voxels, np.asarray(reoriented.dataobj).transpose(2, 1, 0))
    np.testing.assert_allclose(volume.affine[:, [2, 1, 0, 3]], RAS @ reoriented.affine, atol=1e-9)
    assert volume.voxels.flags.c_contiguous


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_identity_does_not_depend_on_the_order_of_axes_in_the_file(order):
    volume = oblique_volume()
    turned = canonical_volume(volume.voxels.transpose(order)[::-1], turned_affine(volume, order))
    assert turned.sha256 == volume.sha256
    assert turned.same_grid(volume)


def turned_affine(volume: Volume, order: tuple[int, ...]) -> np.ndarray:
    affine = volume.affine[:, [*order, 3]].copy()
    affine[:3, 3] += affine[:3, 0] * (volume.shape[order[0]] - 1)
    affine[:3, 0] *= -1
    return affine


def test_one_other_voxel_is_another_image():
    volume = oblique_volume()
    voxels = volume.voxels.copy()
    voxels[2, 3, 1] += 1
    assert volume.with_voxels(voxels).sha256 != volume.sha256


def test_a_grid_half_a_millimetre_aside_is_another_grid():
    volume = oblique_volume()
    affine = volume.affine.copy()
    affine[0, 3] += 0.5
    assert not volume.same_grid(Volume(volume.voxels, affine))


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.diag([1.0, 1, 1, 1]), "axes must run"),
        (np.zeros((4, 4)), "4 x 4 affine"),
        (np.full((4, 4), np.nan), "4 x 4 affine"),
        (axial_affine((2.5, 1, 1)) * [[1], [1], [0], [1]], "singular"),
    ],
)
def test_an_impossible_affine_is_a_mistake(affine, message):
    with pytest.raises(ValueError, match=message):
        Volume(np.zeros((2, 2, 2), np.int16), affine)


def test_only_arrays_of_three_dimensions_are_volumes():
    with pytest.raises(ValueError, match=r"got shape \(2, 2\)"):
        Volume(np.zeros((2, 2), np.int16), axial_affine((1, 1, 1)))
