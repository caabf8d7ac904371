"""The lung range against drawn bodies whose lungs are known, and against the lung labels of a real CT."""

import time

import numpy as np
import pytest
import SimpleITK as sitk

from pe_app.common.errors import InputError
from pe_app.ct.lungs import SliceRange, find_lungs, lung_range
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import read_volume

SLICES, MATRIX, PIXEL_MM = 60, 100, 4.0
LUNG = SliceRange(20, 49)


class Body:
    """A cylinder of tissue in air, 5 mm slices, with lungs from slice 20 to 49; anything can be drawn into it."""

    def __init__(self):
        self.z, self.y, self.x = np.meshgrid(
            np.arange(SLICES), np.arange(MATRIX) - 50, np.arange(MATRIX) - 50, indexing="ij"
        )
        self.hu = np.full(self.z.shape, -1000.0)
        self.draw(40, (0, 0), (30, 42), SliceRange(0, SLICES - 1))
        for side in (-20, 20):
            self.draw(-850, (0, side), (20, 14), LUNG)

    def draw(self, hu: float, centre: tuple[float, float], radii: tuple[float, float], slices: SliceRange) -> "Body":
        ellipse = ((self.y - centre[0]) / radii[0]) ** 2 + ((self.x - centre[1]) / radii[1]) ** 2 < 1
        self.hu[ellipse & (self.z >= slices.first) & (self.z <= slices.last)] = hu
        return self

    def volume(self) -> Volume:
        noisy = self.hu + np.random.default_rng(0).normal(0, 15, self.hu.shape)
        voxels = np.rint(noisy).clip(-1024, 3000).astype(np.int16)
        return Volume(voxels, axial_affine((5.0, PIXEL_MM, PIXEL_MM)))


def test_the_range_is_that_of_the_lungs_and_not_of_the_air_round_the_body():
    assert lung_range(Body().volume()) == LUNG


def test_the_trachea_alone_above_the_apices_is_no_lung():
    assert lung_range(Body().draw(-990, (0, 0), (2.5, 2.5), SliceRange(40, 59)).volume()) == LUNG


def test_a_trachea_joined_with_the_lungs_and_open_at_the_mouth_is_no_lung():
    body = Body().draw(-990, (0, 0), (2.5, 2.5), SliceRange(40, 59))
    body.draw(-990, (0, 0), (2.5, 22), SliceRange(40, 40))
    body.draw(-1000, (-20, 0), (20, 2.5), SliceRange(58, 59))
    assert lung_range(body.volume()) == LUNG


def test_gas_in_stomach_and_bowel_is_no_lung():
    body = Body().draw(-985, (-10, 15), (9, 9), SliceRange(10, 22))
    body.draw(-985, (-12, -12), (10, 22), SliceRange(0, 9))
    assert lung_range(body.volume()) == LUNG


def test_the_foam_of_a_table_is_no_lung():
    body = Body()
    everywhere = SliceRange(0, SLICES - 1)
    body.draw(-300, (42, 0), (9, 45), everywhere).draw(-880, (42, 0), (8, 44), everywhere)
    body.draw(40, (0, 0), (30, 42), SliceRange(0, 0))
    assert lung_range(body.volume()) == LUNG


def test_a_field_of_view_that_cuts_the_lungs_at_the_sides_leaves_their_range():
    volume = Body().volume()
    narrow = Volume(volume.voxels[:, 15:85, 22:78], volume.affine)
    assert lung_range(narrow) == LUNG


def test_padding_round_a_circular_field_of_view_is_no_lung():
    body = Body()
    body.hu[body.y**2 + body.x**2 > 45**2] = -1024
    assert lung_range(body.volume()) == LUNG


def test_one_lung_is_enough():
    assert lung_range(Body().draw(40, (0, 20), (21, 15), LUNG).volume()) == LUNG


def test_emphysema_nearly_as_dark_as_air_is_lung():
    body = Body()
    for side in (-20, 20):
        body.draw(-955, (0, side), (19, 13), LUNG)
    assert lung_range(body.volume()) == LUNG


def test_where_there_is_no_lung_the_message_says_so():
    body = Body()
    body.hu[body.hu == -850] = 40
    body.draw(-985, (0, 0), (12, 25), SliceRange(10, 30))
    with pytest.raises(InputError, match=r"volume: no lung found in 60 slices from z 0\.0 to 295\.0 mm"):
        lung_range(body.volume())


def test_lung_areas_are_those_of_the_drawn_ellipses():
    areas = find_lungs(Body().volume()).areas_mm2
    assert areas.shape == (SLICES,)
    assert areas[35] == pytest.approx(2 * np.pi * 20 * 14 * PIXEL_MM**2, rel=0.1)
    assert not areas[[0, 10, 55]].any()


def test_thin_slices_give_the_same_range_in_mm():
    volume = Body().volume()
    thin = Volume(np.repeat(volume.voxels, 8, axis=0), axial_affine((0.625, PIXEL_MM, PIXEL_MM)))
    found = lung_range(thin)
    assert np.abs(np.array(found) * 0.625 - (20 * 5, 49 * 5 + 4.375)).max() <= 2.6


def test_the_range_of_a_real_ct_is_that_of_its_lung_labels(real_data):
    folder = real_data / "ct_cip64_lunglabels"
    volume = read_volume(folder / "ct-64.nrrd")
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "wholeLung-64.nrrd")))
    areas = np.count_nonzero(labels, axis=(1, 2)) * volume.spacing_mm[1] * volume.spacing_mm[2]
    labelled = np.flatnonzero(areas > 300)
    assert np.abs(np.array(lung_range(volume)) - labelled[[0, -1]]).max() <= 1
    correlation = np.corrcoef(find_lungs(volume).areas_mm2, areas)[0, 1]
    assert correlation > 0.995


def test_the_lungs_of_a_whole_real_chest_are_found_in_a_second(real_data):
    volume = read_volume(real_data / "ct_lidc0001_contrast")
    start = time.process_time()
    found = lung_range(volume)
    assert time.process_time() - start < 1.0
    # read off the slices by eye: tip of the left apex at z -28, tip of the right recess at z -290 mm
    assert volume.slice_z_mm[found.last] == pytest.approx(-28, abs=5)
    assert volume.slice_z_mm[found.first] == pytest.approx(-290, abs=12.5)
