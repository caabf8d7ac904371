"""Simulated studies and painted emboli: the ground truth of everything else, so it is checked against itself twice.

The oracle of most tests is the same study without its emboli, drawn from the same generator state, or an independent
reader of the files.
"""

import csv
from dataclasses import replace

import nibabel as nib
import nrrd
import numpy as np
import pytest
from scipy import ndimage

from pe_app.annotation.sparse import SparseAnnotation, slice_schedule
from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled
from pe_app.ct.lungs import lung_range
from pe_app.ct.quality import check_study
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import read_volume
from pe_app.phantom import (
    PhantomConfig,
    find_arteries,
    make_phantom,
    paint_emboli,
    write_phantom_studies,
)
from pe_app.phantom.emboli import clot_along, place_clots
from pe_app.phantom.vessels import Tree
from pe_app.studies import read_studies

SMALL = PhantomConfig(matrix=128, spacing_mm=4.0)
TINY = PhantomConfig(matrix=64, spacing_mm=10.0)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def pairs():
    """The same three studies with and without emboli."""
    return [
        tuple(make_phantom(np.random.default_rng(seed), SMALL, positive) for positive in (True, False))
        for seed in SEEDS
    ]


def test_the_same_seed_gives_the_same_voxels(pairs):
    again = make_phantom(np.random.default_rng(SEEDS[1]), SMALL, True)
    assert again.volume.sha256 == pairs[1][0].volume.sha256
    assert again.emboli == pairs[1][0].emboli


def test_another_seed_gives_another_patient(pairs):
    assert pairs[0][0].volume.shape != pairs[1][0].volume.shape or (
        pairs[0][0].volume.sha256 != pairs[1][0].volume.sha256
    )


def test_a_negative_study_has_no_embolus(pairs):
    for _, negative in pairs:
        assert negative.emboli == ()
        assert not negative.emboli_mask.voxels.any()


def test_emboli_lie_in_pulmonary_arteries_and_nowhere_else(pairs):
    for positive, _ in pairs:
        mask = positive.emboli_mask.voxels > 0
        assert mask.any()
        assert not (mask & (positive.arteries.voxels == 0)).any()


def test_every_number_of_the_mask_is_one_listed_embolus(pairs):
    for positive, _ in pairs:
        numbers = np.unique(positive.emboli_mask.voxels)
        assert numbers.tolist() == list(range(len(positive.emboli) + 1))
        assert 1 <= len(positive.emboli) <= 6


def test_volume_and_centre_of_an_embolus_are_those_of_its_voxels(pairs):
    for positive, _ in pairs:
        affine = positive.volume.affine
        image = nib.Nifti1Image(positive.emboli_mask.voxels, affine)  # nibabel: voxels to mm, voxel volume
        for number, embolus in enumerate(positive.emboli, start=1):
            inside = positive.emboli_mask.voxels == number
            assert embolus.volume_mm3 == pytest.approx(inside.sum() * abs(np.linalg.det(image.affine[:3, :3])))
            index = np.rint(nib.affines.apply_affine(np.linalg.inv(affine), embolus.centre_lps_mm)).astype(int)
            assert inside[tuple(index)]


def test_away_from_its_emboli_a_study_differs_from_its_twin_only_in_arteries_behind_an_occlusion(pairs):
    for positive, negative in pairs:
        assert positive.volume.same_grid(negative.volume)
        difference = positive.volume.voxels.astype(int) - negative.volume.voxels
        emboli = positive.emboli_mask.voxels > 0
        assert (difference[emboli] != 0).mean() > 0.95
        away = ~ndimage.binary_dilation(emboli, np.ones((3, 3, 3)), iterations=2)
        assert np.count_nonzero(difference[away] > 1) <= 10  # blood at the ends of a stretch that a clot widened
        arteries = ndimage.binary_dilation(negative.arteries.voxels > 0, np.ones((3, 3, 3)))
        assert not ((difference < -250) & away & ~arteries).any()  # less: arteries too thin for the mask
        assert np.count_nonzero(difference[away & ~arteries]) < 2e-3 * difference.size


@pytest.mark.parametrize("seed", [4, 11])  # with an embolus thick enough to have a core
def test_an_embolus_has_its_30_to_80_hu_before_noise(seed):
    positive, negative = (make_phantom(np.random.default_rng(seed), SMALL, p) for p in (True, False))
    # Both have the same noise: their difference is the clot minus the blood, without noise.
    blood = np.median(negative.volume.voxels[ndimage.binary_erosion(negative.arteries.voxels > 0)])
    difference = positive.volume.voxels.astype(int) - negative.volume.voxels
    cores = [ndimage.binary_erosion(positive.emboli_mask.voxels == n + 1, np.ones((3, 3, 3))) for n in range(4)]
    core, embolus = max(zip(cores, positive.emboli, strict=False), key=lambda pair: pair[0].sum())
    assert core.sum() >= 20
    assert 30 <= embolus.hu <= 80
    assert blood + np.median(difference[core]) == pytest.approx(embolus.hu, abs=12)
    assert np.percentile(np.abs(difference[core] - np.median(difference[core])), 75) <= 2


def test_tissues_have_the_hu_of_a_contrast_enhanced_chest(pairs):
    for _, negative in pairs:
        volume = negative.volume
        middle = volume.voxels[volume.shape[0] // 2]
        assert volume.voxels.dtype == np.int16
        assert volume.voxels.min() >= -1024
        assert middle[0, 0] < -900  # air
        lung = middle[(middle < -600) & _inside_body(middle)]
        assert -900 < np.median(lung) < -780
        assert 0.15 < lung.size / _inside_body(middle).sum() < 0.6
        arteries = ndimage.binary_erosion(negative.arteries.voxels > 0)
        assert 200 < np.median(volume.voxels[arteries]) < 560
        fat = ((middle > -140) & (middle < -60) & _inside_body(middle)).sum()
        muscle = ((middle > 20) & (middle < 90)).sum()
        bone = (middle > 350).sum()
        assert min(fat, muscle, bone) > 100


def _inside_body(plane):
    return ndimage.binary_fill_holes(ndimage.binary_opening(plane > -300, iterations=2))


def test_a_phantom_is_a_study_that_the_method_accepts(pairs):
    for positive, _ in pairs:
        assert [reason.code for reason in check_study(positive.volume) if reason.refuses] == []


def test_the_lungs_end_within_the_field(pairs):
    for positive, _ in pairs:
        lung = lung_range(positive.volume)
        assert lung.first > 0
        assert lung.last < positive.volume.shape[0] - 1


def test_spacing_and_matrix_are_those_asked_for():
    phantom = make_phantom(np.random.default_rng(0), PhantomConfig(matrix=96, spacing_mm=9.5), False)
    assert phantom.volume.shape[1:] == (96, 96)
    assert phantom.volume.spacing_mm[0] == pytest.approx(9.5)
    with pytest.raises(ValueError, match="matrix from 64"):
        PhantomConfig(matrix=32)


def test_a_tree_reaches_every_point_and_thins_out_as_murray_says():
    rng = np.random.default_rng(0)
    tree = Tree()
    tree.add([(0, 0, 0), (0, 0, 5), (0, 0, 10)], 5.0, -1)
    targets = rng.uniform(20, 60, (40, 3))
    tree.grow(0, targets, 0.6, rng)
    ends = np.array([branch.points[-1] for branch in tree.branches if not branch.children])
    assert np.abs(np.sort(ends, axis=0) - np.sort(targets, axis=0)).max() < 1e-9
    assert tree.branches[1].radius_mm[0] == pytest.approx(0.6 * 40 ** (1 / 2.4))
    assert len(tree.downstream(0)) == len(tree.branches) - 1


def test_emboli_are_of_all_places_and_in_different_arteries():
    rng = np.random.default_rng(0)
    tree = Tree()
    tree.add([(0, 0, 0), (0, 0, 20), (0, 0, 40)], 13.0, -1)
    for side in (-1, 1):
        main = tree.add([(0, 0, 40), (side * 20, 0, 45), (side * 40, 0, 45)], 9.0, 0)
        targets = rng.uniform((side * 110 - 60, -60, -15), (side * 110 + 60, 60, 105), (150, 3))
        tree.grow(main, targets, 0.65, rng)
    clots = [clot for seed in range(60) for clot in place_clots(tree, np.random.default_rng(seed), 4, 0.8)]
    assert {clot.place for clot in clots} == {"saddle", "central", "lobar", "segmental", "subsegmental"}
    assert 0.15 < np.mean([clot.occluded is not None for clot in clots]) < 0.6
    for clot in clots:
        assert 30 <= clot.hu <= 80


def test_a_large_burden_lies_in_central_and_lobar_arteries_and_takes_a_fifth_of_their_lumen():
    large = replace(SMALL, burden="large")
    for seed in SEEDS:
        positive, negative = (
            make_phantom(np.random.default_rng(seed), large, with_clots) for with_clots in (True, False)
        )
        assert 3 <= len(positive.emboli) <= 5
        assert {embolus.place for embolus in positive.emboli} <= {"saddle", "central", "lobar"}
        clot = positive.emboli_mask.voxels > 0
        worst = clot.sum((1, 2)).argmax()
        assert clot[worst].sum() > 0.2 * negative.arteries.voxels[worst].sum()  # the same arteries, full of contrast
        assert clot.sum() * np.prod(positive.volume.spacing_mm) > 5000


def test_a_clot_that_does_not_occlude_stays_within_its_artery():
    points = np.stack([np.zeros(30), np.zeros(30), np.arange(30.0)], axis=1)
    for seed in range(20):
        for wall in (0.0, 1.0):
            centres, radius = clot_along(points, np.full(30, 5.0), np.random.default_rng(seed), 0.6, wall)
            reach = np.hypot(centres[:, 0], centres[:, 1]) + radius
            assert reach.max() <= 5.0 * 1.2  # the drawing then cuts it at the wall
            assert radius[[0, -1]].max() < radius.max()


def _tube_volume(noise_hu=15.0):
    """A bent enhanced artery (400 HU, radius 6 mm) in fat with a known mask."""
    shape, spacing = (40, 64, 64), (2.0, 1.0, 1.0)
    z, y, x = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    away = np.hypot(x - 32 - 6 * np.sin(z / 20), y - 32)
    hu = np.where(away < 6, 400.0, -80.0) + np.random.default_rng(0).normal(0, noise_hu, shape)
    volume = Volume(hu.astype(np.int16), axial_affine(spacing), "tube")
    return volume, volume.with_voxels((away < 6).astype(np.uint8))


def test_painted_emboli_lie_in_the_artery_and_change_nothing_else():
    volume, arteries = _tube_volume()
    for seed in range(6):
        painted = paint_emboli(volume, arteries, np.random.default_rng(seed), count=2)
        mask = painted.emboli_mask.voxels
        assert 1 <= len(painted.emboli) <= 2
        assert not ((mask > 0) & (arteries.voxels == 0)).any()
        changed = painted.volume.voxels != volume.voxels
        assert not (changed & ~ndimage.binary_dilation(arteries.voxels > 0, np.ones((1, 3, 3)))).any()
        assert painted.volume.same_grid(volume)


def test_a_painted_clot_has_its_hu_and_keeps_the_noise_of_the_blood():
    volume, arteries = _tube_volume(noise_hu=15.0)
    checked = 0
    for seed in range(12):
        painted = paint_emboli(volume, arteries, np.random.default_rng(seed), count=1)
        core = ndimage.binary_erosion(painted.emboli_mask.voxels > 0, np.ones((1, 3, 3)))
        if core.sum() < 60:
            continue
        values = painted.volume.voxels[core]
        assert np.median(values) == pytest.approx(painted.emboli[0].hu, abs=20)
        assert np.std(values) == pytest.approx(15.0, abs=9)
        checked += 1
    assert checked >= 3


def test_painted_emboli_do_not_touch_each_other():
    volume, arteries = _tube_volume()
    for seed in range(3):
        painted = paint_emboli(volume, arteries, np.random.default_rng(seed), count=4)
        mask = painted.emboli_mask.voxels
        assert sorted(set(np.unique(mask)) - {0}) == list(range(1, len(painted.emboli) + 1))
        for number in range(1, len(painted.emboli) + 1):
            around = ndimage.binary_dilation(mask == number, np.ones((3, 3, 3)))
            assert set(np.unique(mask[around])) <= {0, number}


def test_every_painted_embolus_can_be_seen():
    """Also where the mask of arteries reaches into vessels so thin that their voxels are mostly lung."""
    phantom = make_phantom(np.random.default_rng(4), PhantomConfig(matrix=160, spacing_mm=4.0), positive=False)
    for seed in range(6):
        painted = paint_emboli(phantom.volume, phantom.arteries, np.random.default_rng(seed), count=5)
        assert painted.emboli
        for number in range(1, len(painted.emboli) + 1):
            place = painted.emboli_mask.voxels == number
            before, after = (float(ct.voxels[place].mean()) for ct in (phantom.volume, painted.volume))
            assert before > 0  # blood, not lung
            assert after < before - 40


def test_painting_the_same_seed_twice_gives_the_same_voxels():
    volume, arteries = _tube_volume()
    first, second = (paint_emboli(volume, arteries, np.random.default_rng(5)) for _ in range(2))
    assert first.volume.sha256 == second.volume.sha256
    assert first.emboli == second.emboli


def test_an_empty_or_foreign_mask_of_arteries_is_refused():
    volume, arteries = _tube_volume()
    with pytest.raises(InputError, match="the mask of arteries is empty"):
        paint_emboli(volume, arteries.with_voxels(np.zeros(volume.shape, np.uint8)), np.random.default_rng(0))
    with pytest.raises(InputError, match="another grid"):
        paint_emboli(volume, Volume(arteries.voxels, axial_affine((1.0, 1.0, 1.0))), np.random.default_rng(0))


def test_arteries_are_found_in_a_phantom_by_their_contrast():
    phantom = make_phantom(np.random.default_rng(3), PhantomConfig(matrix=256, spacing_mm=4.0), False)
    found = find_arteries(phantom.volume).voxels > 0
    assert found.any()
    # vessels, not organs: in the lungs and hila, a few per cent of the chest, bright
    assert found.mean() < 0.02
    assert np.median(phantom.volume.voxels[found]) > 150
    truth = phantom.arteries.voxels > 0
    assert (found & truth).sum() > 0.25 * found.sum()  # veins are the larger part of the rest


def test_emboli_painted_into_real_enhanced_ct_are_clots_in_bright_vessels(real_data):
    volume = read_volume(real_data / "ct_lidc0001_contrast" / "dicom")
    arteries = find_arteries(volume)
    painted = paint_emboli(volume, arteries, np.random.default_rng(0), count=3)
    mask = painted.emboli_mask.voxels
    assert len(painted.emboli) == 3
    for number, embolus in enumerate(painted.emboli, start=1):
        assert embolus.volume_mm3 >= 25
        before, after = (np.median(ct.voxels[mask == number]) for ct in (volume, painted.volume))
        assert before > 150
        assert after < before - 80


def test_the_study_list_reads_back_and_its_files_agree(tmp_path):
    path = write_phantom_studies(tmp_path, 5, seed=8, config=TINY)
    studies = read_studies(path)
    assert len(studies) == 5
    assert {study.label for study in studies} == {"positive", "negative"}
    patients = [study.patient for study in studies]
    assert all(patients)
    assert len(set(patients)) < 5  # some patients have two studies
    assert 0 < sum(study.annotation is not None for study in studies) < 5
    with path.open(newline="", encoding="utf-8") as file:
        assert [row["study"] for row in csv.DictReader(file)] == [study.study for study in studies]
    for study in studies:
        voxels, _ = nrrd.read(str(study.path), index_order="C")
        volume = read_volume(study.path)
        assert np.array_equal(voxels, volume.voxels)
        truth = tmp_path / "masks" / study.path.name
        assert truth.exists() == (study.label == "positive")
        if study.annotation is None:
            continue
        annotation = SparseAnnotation.read(study.annotation, volume)
        assert annotation.is_complete(slice_schedule(volume))
        mask = nrrd.read(str(truth), index_order="C")[0] if truth.exists() else np.zeros(volume.shape)
        for reviewed in annotation.slices:
            plane = mask[reviewed.slice_index] > 0
            assert reviewed.state == ("embolism" if plane.any() else "none")
            if plane.any():
                assert np.array_equal(annotation.masks[reviewed.slice_index], plane)


def test_two_workers_write_the_files_that_one_writes(tmp_path):
    lists = [write_phantom_studies(tmp_path / str(n), 2, seed=3, config=TINY, workers=n) for n in (1, 2)]
    one, two = (sorted(p for p in path.parent.rglob("*") if p.is_file()) for path in lists)
    assert [p.relative_to(lists[0].parent) for p in one] == [p.relative_to(lists[1].parent) for p in two]
    for a, b in zip(one, two, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_writing_again_goes_on_where_it_was_interrupted(tmp_path):
    def after_two(progress):
        if progress.done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        write_phantom_studies(tmp_path, 3, seed=3, config=TINY, progress=after_two)
    assert not (tmp_path / "studies.csv").exists()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "volumes").iterdir()}
    assert len(written) == 2
    studies = read_studies(write_phantom_studies(tmp_path, 3, seed=3, config=TINY))
    assert all(study.path.exists() for study in studies)
    assert {path: path.stat().st_mtime_ns for path in written} == written
