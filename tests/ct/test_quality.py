"""What is refused and what is warned of: on real CT of known kind, on phantoms, and on drawn chests of known HU."""

import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_rescale

from pe_app.common.errors import InputError, UnfitStudy
from pe_app.ct.lungs import find_lungs
from pe_app.ct.quality import CODES, QualityLimits, Reason, blood_hu, check_study, judged, read_limits
from pe_app.ct.source_series import SeriesFacts, SourceSeries, unlike_ct
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import read_volume
from pe_app.phantom import PhantomConfig, make_phantom


@lru_cache(maxsize=6)  # a second each, and nobody writes into them
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


@pytest.mark.parametrize(("gone_mm", "end"), [(45, "lower"), (65, "lower"), (20, "upper"), (40, "upper")])
def test_lungs_that_taper_are_told_by_how_much_they_are_cut(gone_mm, end):
    """Cones below and domes above, cut at a known height; one adult's real lungs lie between the two estimates."""
    slices = np.arange(80) * 3.0
    below, above = np.clip((slices - 3) / 90, 0, 1), np.clip((237 - slices) / 100, 0, 1)
    size = np.minimum(below, np.sqrt(1 - (1 - above) ** 2))  # lengths: the area is their square
    hu = chest(slices=80, lung=(0, 80)).voxels.copy()
    axis = (np.arange(256) - 127.5) * 360 / 256
    for k, scale in enumerate(size):
        lung = np.zeros((256, 256), bool)
        for side in (-75, 75):
            radii = max(85 * scale, 1e-6), max(55 * scale, 1e-6)
            lung |= (axis[:, None] / radii[0]) ** 2 + ((axis[None] - side) / radii[1]) ** 2 < 1
        hu[k][(hu[k] < -600) & (hu[k] > -960) & ~lung] = 40
    whole = Volume(hu, axial_affine((3.0, 360 / 256, 360 / 256)))
    assert "lungs_cut" not in codes(whole)
    cut = round(gone_mm / 3) + 1
    kept = Volume(hu[cut:] if end == "lower" else hu[:-cut], whole.affine)
    (reason,) = (reason for reason in check_study(kept) if reason.code == "lungs_cut")
    (told_mm,) = re.findall(r"about (\d+) mm", reason.message)
    assert float(told_mm) == pytest.approx(gone_mm, abs=12)
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
    (reason,) = check_study(chest(lung=(0, 0)))
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
    warned = {"coarse_spacing": False, "field_of_view": False, "lungs_cut": False, "lossy": False, "derived": False}
    assert reasons == {"no_contrast": True, **warned}  # its headers say "lossy image compression 01"


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


# What the headers say


def from_series(volume: Volume, **facts: object) -> Volume:
    source = SourceSeries(
        "", "1.2", "1.3", "1.4", "1.5", (1, 0, 0, 0, 1, 0), (1, 1), (2, 2), facts=SeriesFacts(**facts)
    )
    return replace(volume, source=source)


@pytest.fixture(scope="module")
def fit() -> Volume:
    return chest(slices=50, spacing_mm=5.0, matrix=256, lung=(5, 45))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"image_types": ("ORIGINAL\\PRIMARY\\AXIAL",)}, {}),
        ({"image_types": ("DERIVED\\SECONDARY\\MPR",)}, {"derived": False}),
        ({"image_types": ("DERIVED\\SECONDARY\\REFORMATTED\\AVERAGE",)}, {"derived": False}),
        ({"image_types": ("DERIVED\\SECONDARY\\MIP",)}, {"derived": True}),
        ({"image_types": ("DERIVED\\PRIMARY\\VOLUME\\MAXIMUM",)}, {"derived": True}),
        ({"description": "Thorax MIP 8/3"}, {"derived": True}),
        ({"description": "Iodine map PE"}, {"derived": True}),
        ({"lossy": "JPEG 2000, 10:1"}, {"lossy": False}),
        ({"thickness_mm": 1.0}, {"coarse_spacing": False}),
        ({"thickness_mm": 6.0}, {}),
        ({"repeated": 3}, {"uneven_spacing": False}),
        ({"neighbours": 1}, {"mixed_series": False}),
    ],
)
def test_what_headers_say_of_a_series_becomes_a_reason(fit, facts, expected):
    before = check_study(fit)
    added = [reason for reason in check_study(from_series(fit, **facts)) if reason not in before]
    assert {reason.code: reason.refuses for reason in added} == expected


@pytest.mark.parametrize(
    ("image_type", "description", "unlike"),
    [
        ("ORIGINAL\\PRIMARY\\AXIAL", "CHEST COMPARE MINIMAL", False),
        ("DERIVED\\SECONDARY\\MIN IP", "", True),
        ("DERIVED\\PRIMARY", "AX_MIP_THIN", True),
        ("ORIGINAL\\PRIMARY", "CT Angio PE 1.0 Bv40", False),
        ("ORIGINAL\\PRIMARY", "Chest impression", False),
        ("DERIVED\\SECONDARY\\PROJECTION IMAGE", "", True),
    ],
)
def test_projections_are_told_by_whole_words(image_type, description, unlike):
    assert bool(unlike_ct(image_type, description)) == unlike


# What the pixels say


def test_a_coronal_reformat_in_a_file_without_headers_is_refused():
    volume = chest()
    (reason,) = (r for r in check_study(Volume(volume.voxels[:, ::2], axial_affine((3.0, 2.8, 1.4)))) if r.refuses)
    assert reason.code == "derived"
    assert "coronal" in reason.message


@pytest.mark.parametrize(("degrees", "expected"), [(2, {}), (10, {"derived": False}), (30, {"derived": True})])
def test_slices_turned_out_of_the_axial_plane_are_told(fit, degrees, expected):
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(4)
    turn[1:3, 1:3] = [[cos, -sin], [sin, cos]]
    turned = codes(Volume(fit.voxels, turn @ fit.affine))
    assert {code: turned[code] for code in turned if code == "derived"} == expected


@pytest.mark.parametrize(("ml", "warned"), [(1.5, False), (12, True)])
def test_metal_at_the_height_of_the_heart_is_warned_of(ml, warned):
    volume = chest()
    voxels = volume.voxels.copy()
    rod = round(ml * 1000 / (3.0 * (360 / 256) ** 2) / 40)
    voxels[20:60, 170, 128 : 128 + rod] = 3071
    assert codes(volume.with_voxels(voxels)) == ({"metal": False} if warned else {})


def test_filling_that_passes_for_tissue_is_refused_and_air_is_not(fit):
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    outside = np.hypot(y, x) > 1
    for filling, refused in ((0, True), (-1024, False), (-2000, False)):
        voxels = fit.voxels.copy()
        voxels[:, outside] = filling
        assert codes(fit.with_voxels(voxels)).get("padding", False) == refused


@pytest.mark.parametrize(("blank", "expected"), [([0, 1], {"padding": False}), ([25], {"padding": True})])
def test_blank_slices_are_told_and_refused_within_the_lungs(fit, blank, expected):
    voxels = fit.voxels.copy()
    voxels[blank] = -1024
    found = codes(fit.with_voxels(voxels))
    assert {code: found[code] for code in found if code == "padding"} == expected


# Settings


def test_an_accepted_reason_only_warns_and_says_so():
    (reason,) = check_study(chest(blood=45), QualityLimits(accept=("no_contrast",)))
    assert (reason.code, reason.refuses) == ("no_contrast", False)
    assert reason.message.endswith("[would be refused; accepted by the user]")


def test_a_warning_can_be_made_a_refusal_also_that_of_a_model():
    assert check_study(chest(blood=150), QualityLimits(refuse=("weak_contrast",)))[0].refuses
    (reason,) = judged([Reason("demo_model", "painted", False)], QualityLimits(refuse=("demo_model",)))
    assert reason.refuses


def test_limits_come_from_a_file_and_codes_beside_it(tmp_path):
    path = tmp_path / "limits.json"
    path.write_text(json.dumps({"no_contrast_hu": 130, "accept": ["lungs_cut"]}))
    limits = read_limits(path, accept=["matrix"], refuse=["lossy"])
    assert limits == QualityLimits(no_contrast_hu=130, accept=("lungs_cut", "matrix"), refuse=("lossy",))


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"no_contrast": 1}', "no_contrast_hu"), ("[1]", "object"), ('{"cut_area": "x"}', "limits"), ("{", "limits")],
)
def test_a_wrong_file_of_limits_is_told(tmp_path, text, message):
    path = tmp_path / "limits.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_limits(path)


def test_unknown_codes_and_those_without_a_volume_are_told():
    with pytest.raises(InputError, match="the codes are no_contrast"):
        QualityLimits(accept=("contrast",))
    with pytest.raises(InputError, match="uneven_spacing cannot be accepted"):
        QualityLimits(accept=("uneven_spacing",))


def test_every_code_that_the_program_gives_is_explained():
    given = set()
    for path in (Path(__file__).parents[2] / "pe_app").rglob("*.py"):
        given |= set(re.findall(r'(?:Reason|UnfitStudy)\(\s*"(\w+)"', path.read_text(encoding="utf-8")))
    assert given <= set(CODES)
    assert set(CODES) - given <= {"mixed_series"}  # given by a conditional


def test_mixed_single_slices_of_many_patients_are_refused_as_mixed(real_data):
    with pytest.raises(UnfitStudy, match="25 series of a single slice each") as refusal:
        read_volume(real_data / "slices_tcga_luad")
    assert refusal.value.code == "mixed_series"


@pytest.mark.parametrize(
    ("gone_mm", "end", "tolerance_mm"), [(40, "lower", 20), (70, "lower", 20), (25, "upper", 15), (60, "upper", 20)]
)
def test_the_real_chest_cut_at_either_end_is_told_by_how_much(real_chest, gone_mm, end, tolerance_mm):
    lungs = find_lungs(real_chest).slice_range
    cut = round(gone_mm / 2.5)
    voxels = real_chest.voxels[lungs.first + cut :] if end == "lower" else real_chest.voxels[: lungs.last - cut]
    (reason,) = check_study(Volume(voxels, real_chest.affine))
    assert (reason.code, reason.refuses) == ("lungs_cut", False)
    (told_mm,) = re.findall(r"about (\d+) mm", reason.message)
    assert float(told_mm) == pytest.approx(gone_mm, abs=tolerance_mm)


@pytest.fixture(scope="module")
def real_chest(real_data) -> Volume:
    return read_volume(real_data / "ct_lidc0001_contrast")


@pytest.mark.parametrize("variant", ["noise", "every second slice", "half the matrix", "12 mm of margin", "left part"])
def test_variants_of_the_real_enhanced_chest_are_not_refused(real_chest, variant):
    hu, spacing = real_chest.voxels, [2.5, 0.703125, 0.703125]
    if variant == "noise":
        hu = (hu + np.random.default_rng(0).normal(0, 40, hu.shape)).clip(-1024, 3071).astype(np.int16)
    elif variant == "every second slice":
        hu, spacing[0] = hu[::2], 5.0
    elif variant == "half the matrix":
        hu, spacing = hu[:, ::2, ::2], [2.5, 1.40625, 1.40625]
    elif variant == "12 mm of margin":
        hu = np.pad(hu, ((5, 5), (0, 0), (0, 0)), constant_values=40)
        hu[:5], hu[-5:] = hu[5], hu[-6]
    else:
        hu = hu[:, :, 60:]
    assert not [reason for reason in check_study(Volume(hu, axial_affine(tuple(spacing)))) if reason.refuses]


@pytest.mark.parametrize("scale", [0.75, 0.6, 0.45])
def test_children_are_judged_by_their_smaller_vessels(real_chest, scale):
    """The real adult made smaller: 110 mm of lung and vessels of a tenth of the volume at 0.45."""
    child = Volume(real_chest.voxels, axial_affine(tuple(scale * mm for mm in real_chest.spacing_mm)))
    assert codes(child) == ({"field_of_view": False} if scale < 0.7 else {})
    hu = real_chest.voxels.copy()
    hu[(hu > 60) & (np.arange(512)[:, None] < 330)] = 60
    assert codes(child.with_voxels(hu))["no_contrast"]


@pytest.mark.parametrize(("ceiling", "refused"), [(70, True), (250, False)])
def test_the_real_chest_with_its_contrast_taken_away_is_refused(real_chest, ceiling, refused):
    hu = real_chest.voxels.copy()
    soft = (hu > ceiling) & (np.arange(512)[:, None] < 330)  # vessels and heart; the spine stays
    hu[soft] = ceiling
    reasons = {reason.code: reason.refuses for reason in check_study(real_chest.with_voxels(hu))}
    assert reasons.get("no_contrast", False) == refused
