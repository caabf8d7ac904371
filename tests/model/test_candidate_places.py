"""Side and level of a candidate: on chests drawn to measure, and against labelled lungs."""

import numpy as np
import pytest
import SimpleITK as sitk

from pe_app.ct.lungs import Lungs, SliceRange, find_lungs
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import read_volume
from pe_app.model.candidate_places import place_candidates
from pe_app.model.detection import Candidate

PIXEL_MM, SLICE_MM = 2.5, 5.0
SHAPE = (50, 120, 160)
ORIGIN = (-100.0, -150.0, -250.0)
"""The chest's middle is x 75 mm, the image's 100 mm, the scanner's 0: neither would tell the sides."""


def chest(bridge: bool = False, left: bool = True, vessel: bool = False, nodule: bool = False) -> tuple[Volume, Lungs]:
    """Two boxes of lung, 100 mm wide, with 100 mm of tissue between them."""
    volume = Volume(np.zeros(SHAPE, np.int16), axial_affine((SLICE_MM, PIXEL_MM, PIXEL_MM), ORIGIN))
    mask = np.zeros(SHAPE, bool)
    mask[5:45, 20:100, 10:50] = True  # the patient's right lung: x -75 to 25 mm
    mask[5:45, 20:100, 90:130] = left  # the left lung: x 125 to 225 mm
    if bridge:
        mask[5:45, 20:23, 50:90] = True  # in front, where both touch
    if vessel:
        mask[20:24, 58:62, 25:29] = False  # 10 mm wide, 50 mm from the lung's inner border
    if nodule:
        mask[18:28, 50:66, 14:30] = False  # 40 mm wide, surrounded by the right lung
    return volume, Lungs(mask, (1, 1, 1), np.zeros(SHAPE[0]), SliceRange(5, 44))


def told(drawn: tuple[Volume, Lungs], *x_mm: float) -> list[tuple[str | None, str | None]]:
    """Side and level of places in the middle of the chest's depth and height."""
    candidates = [Candidate(1, -140.0, 0, (x, 0.0, -140.0), (11.0, 11.0, 6.0), 1.0, 1.0) for x in x_mm]
    return [(placed.side, placed.level) for placed in place_candidates(candidates, *drawn)]


PLACES = {
    -60.0: ("right", "peripheral"),
    0.0: ("right", "peripheral"),  # 25 mm into the lung
    15.0: ("right", "central"),  # 10 mm into it
    40.0: ("right", "central"),  # the right main artery
    75.0: ("midline", "central"),
    110.0: ("left", "central"),
    135.0: ("left", "central"),
    160.0: ("left", "peripheral"),
    210.0: ("left", "peripheral"),
    900.0: ("left", "peripheral"),  # beyond the image: as its nearest voxel
}


@pytest.mark.parametrize("bridge", [False, True])
def test_the_side_is_the_nearer_lungs_and_the_level_the_depth_into_it(bridge):
    assert told(chest(bridge), *PLACES) == list(PLACES.values())


def test_a_vessel_in_the_lung_is_no_tissue_between_the_lungs():
    assert told(chest(vessel=True), -32.5) == [("right", "peripheral")]


def test_a_nodule_in_the_lung_is_peripheral():
    assert told(chest(nodule=True), -50.0, -20.0) == [("right", "peripheral")] * 2


def test_with_one_lung_neither_side_nor_level_is_said():
    assert told(chest(left=False), 0.0) == [(None, None)]


THIRDS = {"left": (9, 10, 11), "right": (12, 13, 14)}
"""Chest regions of the labels: upper, middle and lower third of either lung."""


def test_the_sides_of_a_real_chest_are_those_of_its_labelled_lungs(real_data):
    folder = real_data / "ct_cip64_lunglabels"
    volume = read_volume(folder / "ct-64.nrrd")
    image = sitk.ReadImage(str(folder / "lm-64.nrrd"))
    labels = sitk.GetArrayFromImage(image)
    rng = np.random.default_rng(0)
    expected, candidates = [], []
    for side, regions in THIRDS.items():
        places = rng.choice(np.argwhere(np.isin(labels & 255, regions)), 100, replace=False)
        for place in places:
            x, y, z = image.TransformIndexToPhysicalPoint([int(k) for k in place[::-1]])
            candidates.append(Candidate(1, z, 0, (x, y, z), (11.0, 11.0, 6.0), 1.0, 1.0))
            expected.append(side)
    placed = place_candidates(candidates, volume, find_lungs(volume))
    agree = sum(candidate.side == side for candidate, side in zip(placed, expected, strict=True))
    assert agree >= 0.98 * len(expected)
