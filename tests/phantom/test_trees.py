"""Chests round vessel trees: masks in, clots of wanted size along the arteries, HU out."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from vessel_trees import SPACING_MM, branching_masks, write_masks

from pe_app.common.errors import InputError
from pe_app.ct.volume_io import read_mask, read_volume
from pe_app.phantom.chest import Tissue, draw_chest
from pe_app.phantom.clots import Arteries, draw_clots, draw_volumes_ml, grow
from pe_app.phantom.rendering import DrawnWindows, RealWindows, Renderer, blurred
from pe_app.phantom.studies import write_phantom_studies
from pe_app.phantom.tree_studies import make_tree_phantom
from pe_app.phantom.trees import VesselTree, paired, read_tree, tree_names
from pe_app.studies import read_studies

VOXEL_ML = float(np.prod(SPACING_MM)) / 1000


@pytest.fixture(scope="module")
def arteries() -> Arteries:
    return Arteries.of(branching_masks()[0] == 1, SPACING_MM)


def test_a_tree_is_read_with_its_volumes_on_a_coarser_grid(tmp_path):
    write_masks(tmp_path, "one")
    assert tree_names(tmp_path) == ("one",)
    tree = read_tree(tmp_path, "one", (2.5, 1.4, 1.4))
    labels, lungs = branching_masks()
    for shares, mask in ((tree.arteries, labels == 1), (tree.veins, labels == 2), (tree.lungs, lungs > 0)):
        volume_ml = shares.sum() / 255 * 2.5 * 1.4 * 1.4 / 1000
        assert volume_ml == pytest.approx(mask.sum() * VOXEL_ML, rel=0.08)


def test_trees_that_are_not_there_or_lack_a_label_are_refused(tmp_path):
    with pytest.raises(InputError, match="no vessel trees"):
        tree_names(tmp_path)
    write_masks(tmp_path, "one")
    (tmp_path / "one.nii.gz").write_bytes((tmp_path / "one_lungmask.nii.gz").read_bytes())
    with pytest.raises(InputError, match="no voxel of vein"):
        read_tree(tmp_path, "one")
    (tmp_path / "one.nii.gz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        read_tree(tmp_path, "one")


def test_two_slices_become_one():
    shares = np.array([[[0, 255]], [[100, 254]]], np.uint8)
    assert paired(shares).tolist() == [[[50, 254]]]


def test_radius_and_place_in_the_cross_section_of_a_straight_artery(arteries):
    z, y, x = (arteries.voxels * SPACING_MM).T
    straight = (z > 12) & (z < 25)
    middle = straight & (np.hypot(y - 49, x - 70) < 1)
    wall = straight & (np.hypot(y - 49, x - 70) > 6)
    assert arteries.radius_mm[middle].mean() == pytest.approx(7, abs=0.7)
    assert np.linalg.norm(arteries.across[middle], axis=1).mean() < 0.3
    assert np.linalg.norm(arteries.across[wall], axis=1).mean() > 0.7


def test_the_way_along_arteries_is_that_of_the_vessel_not_of_the_crow(arteries):
    places = arteries.voxels * SPACING_MM
    seed = int(np.linalg.norm(places - (75, 49, 23), axis=1).argmin())  # high in one branch
    other = int(np.linalg.norm(places - (75, 49, 117), axis=1).argmin())  # high in the other
    straight = np.linalg.norm(places[seed] - places[other])
    # down to where they part, and up again
    assert straight * 1.15 < arteries.distance_mm(seed, 500)[other] < straight * 1.8
    assert np.isinf(arteries.distance_mm(seed, 20)[other])


@pytest.mark.parametrize("volume_ml", [0.1, 0.5, 2.0, 6.0])
def test_a_clot_has_the_wanted_volume_is_one_piece_and_stays_in_the_artery(arteries, volume_ml):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        clot = grow(arteries, int(rng.integers(len(arteries.voxels))), volume_ml, rng)
        grown_ml = len(clot.members) * VOXEL_ML
        assert grown_ml < 1.5 * volume_ml + 0.05
        assert grown_ml > 0.5 * volume_ml or clot.occlusion < 1  # a thin one may reach its longest length before
        mask = np.zeros(arteries.shape, bool)
        mask[tuple(arteries.voxels[clot.members].T)] = True
        assert ndimage.label(mask, np.ones((3, 3, 3)))[1] == 1


def test_a_large_clot_at_the_bifurcation_lies_in_both_branches(arteries):
    places = arteries.voxels * SPACING_MM
    seed = int(np.linalg.norm(places - (44, 49, 70), axis=1).argmin())
    clot = grow(arteries, seed, 6.0, np.random.default_rng(0), saddle=True)
    x = places[clot.members][:, 2]
    assert (x < 62).any()
    assert (x > 78).any()


def test_clots_of_a_patient_share_no_voxel_and_leave_most_of_the_arteries(arteries):
    for seed in range(4):
        clots = draw_clots(arteries, np.random.default_rng(seed))
        members = np.concatenate([clot.members for clot in clots])
        assert len(np.unique(members)) == len(members)
        assert len(members) < 0.6 * len(arteries.voxels)


def test_volumes_follow_the_percentiles_of_real_clots():
    rng = np.random.default_rng(0)
    volumes = np.array([volume for _ in range(600) for volume in draw_volumes_ml(rng)])
    for share, real_ml in ((5, 0.05), (25, 0.35), (50, 1.13), (75, 5.3), (95, 26.5)):
        assert np.percentile(volumes, share) == pytest.approx(real_ml, rel=0.2)


def test_the_chest_keeps_vessels_free_and_puts_the_heart_between_the_lungs():
    labels, lungs = (array[::2] for array in branching_masks())
    tree = VesselTree("one", *(np.where(mask, 255, 0).astype(np.uint8) for mask in (labels == 1, labels == 2, lungs)),
                      (2.5, 0.7, 0.7))  # fmt: skip
    tissue, span = draw_chest(tree, np.random.default_rng(0))
    assert set(np.unique(tissue[lungs > 0])) <= {
        Tissue.LUNG, Tissue.FINE_VESSEL, Tissue.AIRWAY, Tissue.OPACITY, Tissue.NODE, Tissue.MUCUS
    }  # fmt: skip
    assert np.mean(tissue[lungs > 0] == Tissue.LUNG) > 0.5
    assert span[lungs > 0].all()
    assert not span[:, :2].any()


def windows_of(clots: torch.Tensor) -> DrawnWindows:
    shape = clots.shape
    arteries = torch.zeros(shape)
    arteries[..., 20:44, 20:44] = 1
    return DrawnWindows(
        torch.full(shape, int(Tissue.LUNG)), arteries, torch.zeros(shape), clots, torch.ones(shape[0]) > 0
    )


def test_twins_differ_where_the_clot_is_and_it_is_darker_than_blood():
    clots = torch.zeros(2, 5, 64, 64)
    clots[0, :, 26:38, 26:38] = 1
    groups = torch.zeros(2, dtype=torch.long)
    for seed in range(5):
        hu = Renderer(seed).drawn(windows_of(clots), groups)
        assert torch.equal(hu[0][clots[0] == 0], hu[1][clots[0] == 0])
        inside = clots[0] == 1
        assert (hu[0][inside] <= hu[1][inside]).all()
        assert -10 < float(hu[0][inside].mean()) < 110
        scanned = Renderer(seed).scanned(torch.stack([hu[1], hu[1]]), groups, torch.zeros(2) > 0)
        assert torch.equal(scanned[0], scanned[1])


def test_a_scan_without_contrast_has_no_bright_vessel():
    clots = torch.zeros(1, 5, 64, 64)
    plain = windows_of(clots)
    plain = DrawnWindows(plain.tissue, plain.arteries, plain.veins, clots, torch.zeros(1) > 0)
    for seed in range(5):
        assert Renderer(seed).drawn(plain, torch.zeros(1, dtype=torch.long))[plain.arteries == 1].max() < 100


def test_clots_in_real_ct_replace_the_blood_and_nothing_else():
    shape = (1, 5, 64, 64)
    arteries, clots = torch.zeros(shape), torch.zeros(shape)
    arteries[..., 20:44, 20:44] = 1
    clots[..., 28:36, 28:36] = 1
    hu = arteries * 350 - (1 - arteries) * 800
    windows = RealWindows(hu, arteries * 350, arteries, clots, arteries * 8)
    made = Renderer(0).real(windows, torch.zeros(1, dtype=torch.long), other_bolus=False)
    assert 0 < float(made[..., 30:34, 30:34].mean()) < 120
    far = torch.ones(shape, dtype=torch.bool)
    far[..., 24:40, 24:40] = False
    assert torch.equal(made[far], hu[far])


def test_blurring_is_that_of_scipy():
    image = torch.rand(2, 3, 40, 40)
    ours = blurred(image, torch.tensor([0.6, 0.9]))
    for one, sigma, expected in zip(image, (0.6, 0.9), ours, strict=True):
        theirs = ndimage.gaussian_filter(one.numpy(), (0, sigma, sigma), mode="nearest", radius=(0, 3, 3))
        np.testing.assert_allclose(expected.numpy(), theirs, atol=1e-4)


def test_studies_of_trees_come_as_a_list_with_masks_of_clots_in_arteries(tmp_path):
    write_masks(tmp_path / "vessels", "one")
    path = write_phantom_studies(tmp_path / "out", 2, seed=5, vessels=tmp_path / "vessels")
    positive, negative = read_studies(path)
    assert (positive.label, negative.label) == ("positive", "negative")
    assert positive.patient == negative.patient == "one"
    volume = read_volume(positive.path)
    mask = read_mask(tmp_path / "out" / "masks" / f"{positive.study}.nrrd", volume)
    assert volume.spacing_mm == pytest.approx((2.5, 0.7, 0.7))
    clot = np.asarray(mask.voxels) > 0
    assert clot.any()
    assert -50 < np.median(np.asarray(volume.voxels)[clot]) < 150


def test_a_phantom_of_a_tree_is_the_same_with_and_without_emboli(tmp_path):
    write_masks(tmp_path, "one")
    one, other = (make_tree_phantom(tmp_path, "one", np.random.default_rng(3), positive) for positive in (True, False))
    clot = np.asarray(one.emboli_mask.voxels) > 0
    assert one.emboli
    assert other.emboli == ()
    assert (one.arteries.voxels == other.arteries.voxels).all()
    far = ~ndimage.binary_dilation(clot, iterations=6)
    assert (one.volume.voxels[far] == other.volume.voxels[far]).mean() > 0.999
    assert one.volume.voxels[clot].mean() < other.volume.voxels[clot].mean() - 80
