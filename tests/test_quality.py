"""What is refused and what is warned of: on real CT of known kind, on phantoms, and on drawn chests of known HU."""

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_rescale

from pe_app.lungs import find_lungs
from pe_app.phantom import PhantomConfig, make_phantom
from pe_app.quality import QualityLimits, blood_hu, check_study
from pe_app.volume import Volume, axial_affine
from pe_app.volume_io import read_volume


def chest(
    blood: float = 300.0,
    slices: int = 80,
    spacing_mm: float = 3.0,
    matrix: int = 256,
    field_mm: float = 360.0,
    lung: tuple[int, int] = (10, 70),
) -> Volume:
    """Body, lungs, spine, sternum, and a heart of ``blood`` HU; lengths in mm, so any grid shows the same chest."""
    axis = (np.arange(matrix) - (matrix - 1) / 2) * field_mm / matrix
    y, x = np.meshgrid(axis, axis, indexing="ij")

    def ellipse(centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
        return ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1

    hu = np.full((slices, matrix, matrix), -1000.0)
    hu[:, ellipse((0, 0), (110, 160))] = 40
    for side in (-75, 75):
        hu[lung[0] : lung[1], ellipse((0, side), (85, 55))] = -850
    hu[lung[0] : lung[1], ellipse((-25, 0), (32, 38))] = blood
    for centre, radii in (((70, 0), (18, 22)), ((-92, 0), (7, 22))):
        hu[:, ellipse(centre, radii)] = 600
        hu[:, ellipse(centre, (radii[0] - 3, radii[1] - 3))] = 180
    hu += np.random.default_rng(0).normal(0, 20, hu.shape)
    voxels = np.rint(hu).clip(-1024, 3000).astype(np.int16)
    pixel_mm = field_mm / matrix
    return Volume(voxels, axial_affine((spacing_mm, pixel_mm, pixel_mm)))


def codes(volume: Volume) -> dict[str, bool]:
    return {reason.code: reason.refuses for reason in check_study(volume)}


def test_a_whole_enhanced_chest_has_nothing_against_it():
    assert check_study(chest()) == ()


@pytest.mark.parametrize("blood", [40, 95, 150, 195, 205, 450])
def test_contrast_is_judged_by_the_blood_and_not_by_bone(blood):
    volume = chest(blood)
    hu, z_mm = blood_hu(volume, find_lungs(volume), 20.0)
    assert hu == pytest.approx(blood, abs=12)
    assert 30 <= z_mm <= 210
    expected = {"no_contrast": True} if blood < 100 else {"weak_contrast": False} if blood < 200 else {}
    assert codes(volume) == expected


def test_the_message_says_how_bright_and_where():
    (reason,) = check_study(chest(blood=45))
    assert reason.code == "no_contrast"
    hu, z_mm = blood_hu(chest(blood=45), find_lungs(chest(blood=45)), 20.0)
    assert f"{hu:.0f} HU (about z {z_mm:.0f} mm)" in reason.message


def test_a_vein_full_of_contrast_is_not_enough():
    volume = chest(blood=45)
    voxels = volume.voxels.copy()
    voxels[40:60, 100:109, 120:129] = 900  # 12 mm wide over 60 mm: a superior vena cava
    assert codes(volume.with_voxels(voxels)) == {"no_contrast": True}


@pytest.mark.parametrize(("lung", "end"), [((0, 70), "lower"), ((10, 80), "upper")])
def test_lungs_that_are_cut_off_are_told_with_the_end(lung, end):
    (reason,) = check_study(chest(lung=lung))
    assert (reason.code, reason.refuses) == ("lungs_cut", False)
    assert f"at the {end} end" in reason.message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"spacing_mm": 5.0, "slices": 48, "lung": (6, 42)}, {"coarse_spacing": False}),
        ({"spacing_mm": 6.0, "slices": 40, "lung": (5, 35)}, {"coarse_spacing": True}),
        ({"slices": 40, "lung": (5, 30)}, {"too_few_slices": True}),
        ({"slices": 19, "spacing_mm": 5.0, "lung": (2, 17)}, {"too_few_slices": True, "coarse_spacing": False}),
        ({"matrix": 128}, {"matrix": False}),
        ({"field_mm": 600.0}, {"field_of_view": False}),
        ({"field_mm": 240.0}, {"field_of_view": False}),
    ],
)
def test_a_grid_that_shows_too_little_is_told(settings, expected):
    assert codes(chest(**settings)) == expected


def test_a_field_of_view_of_a_hand_is_refused():
    volume = chest()
    reasons = codes(Volume(volume.voxels[:, 78:178, 78:178], volume.affine))
    assert reasons["field_of_view"]


def test_pixels_of_6_mm_are_refused():
    assert codes(chest(matrix=60))["matrix"]


def test_a_ct_without_lung_is_no_chest():
    volume = chest()
    (reason,) = check_study(volume.with_voxels(np.where(volume.voxels < -700, 40, volume.voxels).astype(np.int16)))
    assert (reason.code, reason.refuses) == ("not_chest", True)


def test_limits_are_settings():
    volume = chest(blood=150)
    assert [reason.code for reason in check_study(volume, QualityLimits(weak_contrast_hu=120))] == []
    assert check_study(volume, QualityLimits(no_contrast_hu=200))[0].refuses


@pytest.mark.parametrize(("matrix", "seed"), [(128, 0), (192, 1), (512, 2)])
def test_a_phantom_is_fit_at_every_matrix(matrix, seed):
    config = PhantomConfig(matrix=matrix, spacing_mm=3.0)
    volume = make_phantom(np.random.default_rng(seed), config, positive=bool(seed % 2)).volume
    assert codes(volume) == ({"matrix": False} if matrix < 256 else {})


def test_the_whole_enhanced_real_chest_is_fit(real_data):
    assert check_study(read_volume(real_data / "ct_lidc0001_contrast")) == ()


def test_the_real_chest_without_contrast_is_refused_for_it(real_data):
    reasons = codes(read_volume(real_data / "ct_acrinflt013_5mm"))
    assert reasons == {"coarse_spacing": False, "field_of_view": False, "lungs_cut": False, "no_contrast": True}


def test_twelve_real_slices_are_too_few(real_data):
    assert codes(read_volume(real_data / "slab_lidc0002"))["too_few_slices"]


def test_a_real_angiography_cropped_to_the_heart_has_contrast_and_is_warned_of(real_data):
    reasons = codes(read_volume(real_data / "ts_cta_central" / "ct_merged_1p5mm.nii.gz"))
    assert reasons == {"matrix": False, "field_of_view": False, "lungs_cut": False}


def test_slices_of_many_scanners_are_told_apart_by_contrast(real_data):
    """TCGA-LUAD tells in the file name whether contrast was given; ID_0050 lies prone, which one slice cannot tell."""
    measured: dict[str, list[float]] = {"CONTRAST_0": [], "CONTRAST_1": []}
    for path in sorted((real_data / "slices_tcga_luad" / "dicom").glob("*.dcm")):
        dataset = pydicom.dcmread(path)
        hu = np.maximum(apply_rescale(dataset.pixel_array, dataset), -1024).astype(np.int16)
        affine = axial_affine((2.5, *map(float, dataset.PixelSpacing)))
        volume = Volume(np.repeat(hu[None], 16, axis=0), affine)
        lungs = find_lungs(volume)
        if lungs.slice_range is not None and "ID_0050" not in path.name:
            measured[path.name[17:27]].append(blood_hu(volume, lungs, 20.0)[0])
    assert len(measured["CONTRAST_1"]) == 12
    assert len(measured["CONTRAST_0"]) >= 5
    limits = QualityLimits()
    assert max(measured["CONTRAST_0"]) < limits.no_contrast_hu < min(measured["CONTRAST_1"])
