"""The recipe of the starter model: twins differ in their emboli and in nothing else."""

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from small_studies import CLASSIFIER, ENCODER, SLABS

from pe_app.annotation import SparseAnnotation
from pe_app.detector import Detector
from pe_app.lungs import SliceRange
from pe_app.phantom import PhantomConfig, make_phantom
from pe_app.progress import silent
from pe_app.starter.backgrounds import drawn_out, varied, whole_chest
from pe_app.starter.figures import held_out_figures
from pe_app.starter.twins import painted_twins, write_all, write_twins
from pe_app.studies import Study
from pe_app.volume import Volume, axial_affine
from pe_app.volume_io import read_mask, read_volume, write_volume


@pytest.fixture(scope="module")
def enhanced(tmp_path_factory):
    """A phantom without emboli as the real CT to paint into, with its arteries: ``CT,ARTERIES``."""
    folder = tmp_path_factory.mktemp("starter") / "patient"
    phantom = make_phantom(np.random.default_rng(4), PhantomConfig(matrix=160, spacing_mm=4.0), positive=False)
    write_volume(phantom.volume, folder / "ct.nrrd")
    write_volume(phantom.arteries, folder / "arteries.nrrd")
    return f"{folder / 'ct.nrrd'},{folder / 'arteries.nrrd'}"


@pytest.fixture(scope="module")
def pairs(enhanced, tmp_path_factory):
    out = tmp_path_factory.mktemp("twins")
    for folder in ("volumes", "masks", "annotations", "slabs"):
        (out / folder).mkdir()
    return out, [(source, write_twins(source, out)) for source in painted_twins(enhanced, 2, seed=5)]


def test_painted_twins_differ_in_their_emboli_only_and_are_marked_alike(pairs):
    out, made = pairs
    assert len(made) == 2
    for _, (with_emboli, without) in made:
        one, other = read_volume(with_emboli.path), read_volume(without.path)
        mask = read_mask(out / "masks" / f"{with_emboli.study}.nii.gz", one).voxels > 0
        changed = one.voxels != other.voxels
        assert changed[mask].mean() > 0.8
        assert not (changed & ~ndimage.binary_dilation(mask, np.ones((3, 9, 9)))).any()
        assert one.voxels[mask].mean() < other.voxels[mask].mean() - 50  # a clot is darker than enhanced blood
        marked = [SparseAnnotation.read(study.annotation) for study in (with_emboli, without)]
        assert [entry.slice_index for entry in marked[0].slices] == [entry.slice_index for entry in marked[1].slices]
        assert {entry.state for entry in marked[0].slices} == {"embolism"}
        assert {entry.state for entry in marked[1].slices} == {"none"}
        assert (with_emboli.patient, with_emboli.split) == (without.patient, without.split)


def test_twins_that_are_there_are_kept(pairs, enhanced):
    out, made = pairs
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = write_all(painted_twins(enhanced, 2, seed=5), out, workers=1)
    assert [studies for _, studies in again] == [studies for _, studies in made]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_variation_bends_ct_and_arteries_together(enhanced):
    background = whole_chest(enhanced)
    other = varied(background, np.random.default_rng(1))
    blood = [float(np.median(each.volume.voxels[each.arteries.voxels > 0])) for each in (background, other)]
    assert not np.array_equal(other.volume.voxels, background.volume.voxels)
    assert blood[1] == pytest.approx(120 + (blood[0] - 120), rel=0.5)  # other contrast, but still blood
    assert blood[1] > 150


def test_a_single_slice_becomes_a_stack_that_drifts_and_a_slice_without_lung_is_passed_over(tmp_path):
    phantom = make_phantom(np.random.default_rng(6), PhantomConfig(matrix=160, spacing_mm=4.0), positive=False)
    busiest = int(np.count_nonzero(phantom.arteries.voxels, axis=(1, 2)).argmax())
    for name, plane in (("hilum", phantom.volume.voxels[busiest]), ("water", np.zeros((160, 160), np.int16))):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing((*phantom.volume.spacing_mm[:0:-1], 4.0))
        sitk.WriteImage(image, str(tmp_path / f"{name}.nrrd"))
    stack = drawn_out(tmp_path / "hilum.nrrd", np.random.default_rng(0))
    assert stack is not None
    assert stack.arteries.voxels.any()
    following = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in itertools.pairwise(stack.volume.voxels)]
    assert min(following) > 0.5
    assert max(following) < 1
    assert drawn_out(tmp_path / "water.nrrd", np.random.default_rng(0)) is None


def test_held_out_figures_count_what_the_detector_says(tmp_path, monkeypatch):
    """A detector that is told the truth: it has every figure, and a detector that lies has none."""
    affine = axial_affine((2.5, 5.0, 5.0))
    studies, truth = [], {}
    for number in range(4):
        voxels = np.full((32, 64, 64), -820, np.int16)
        mask = np.zeros(voxels.shape, np.uint8)
        if number % 2 == 0:
            mask[14:19, 38:43, 38:43] = 1  # in the middle of a cell of 80 mm
        path = tmp_path / "volumes" / f"{number}.nrrd"
        write_volume(Volume(voxels + number, affine, str(number)), path)
        write_volume(Volume(mask, affine, "mask"), tmp_path / "masks" / f"{number}.nii.gz")
        studies.append(Study(str(number), path, label="positive" if number % 2 == 0 else "negative"))
        truth[number] = mask
    monkeypatch.setattr("pe_app.starter.figures.lung_range", lambda volume: SliceRange(0, volume.shape[0] - 1))

    def figures_of(honest):
        detector = Detector.untrained(0, SLABS, ENCODER, CLASSIFIER)
        answers = iter(study.label == "positive" for study in studies)

        def encode(slabs):
            positive = next(answers)
            near = np.abs(slabs.slice_index - 16) < 4
            return positive, np.where(near & positive, 0.9, 0.1)

        def attention(positive):
            maps = np.zeros((6, 4, 4), np.float32)
            maps[:, 2 if honest else 0, 2 if honest else 0] = 1
            return maps

        detector.encode, detector.attention = encode, attention
        detector.classify = lambda positive: float(positive == honest)
        return held_out_figures(detector, studies, tmp_path / "masks", "small", silent)

    figures = {honest: figures_of(honest) for honest in (True, False)}
    assert (figures[True]["held_out_small_auc"], figures[False]["held_out_small_auc"]) == (1, 0)
    assert (figures[True]["held_out_small_accuracy"], figures[False]["held_out_small_accuracy"]) == (1, 0)
    assert (figures[True]["held_out_small_pointing"], figures[False]["held_out_small_pointing"]) == (1, 0)
    assert figures[True]["held_out_small_studies"] == 4
    assert figures[True]["held_out_small_false_candidates"] == 0
