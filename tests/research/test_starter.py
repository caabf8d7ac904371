"""The recipe of the starter model: twins differ in their emboli and in nothing else."""

import itertools
import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from scipy import ndimage
from small_studies import CLASSIFIER, ENCODER, SLABS

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.progress import silent
from pe_app.ct.lungs import SliceRange
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import read_mask, read_volume, write_volume
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig, SlabEncoder
from pe_app.phantom import PhantomConfig, make_phantom, paint_emboli
from pe_app.research.starter.backgrounds import drawn_out, varied, whole_chest
from pe_app.research.starter.cells import (
    LEAST_PIXELS,
    RARE,
    CellJudge,
    CellTraining,
    changed_at_random,
    random_windows,
    score_cells,
    train_cells,
    write_painted_slabs,
)
from pe_app.research.starter.figures import held_out_figures
from pe_app.research.starter.twins import painted_twins, write_all, write_twins
from pe_app.studies import Study
from pe_app.training.datasets import SlabItem


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
    monkeypatch.setattr("pe_app.research.starter.figures.lung_range", lambda volume: SliceRange(0, volume.shape[0] - 1))

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


def test_painted_slabs_hold_the_painted_ct_and_count_the_clot_pixels_of_every_cell(enhanced, tmp_path, monkeypatch):
    kept = {}

    def painted_and_kept(*arguments, **options):
        kept["study"] = paint_emboli(*arguments, **options)
        return kept["study"]

    monkeypatch.setattr("pe_app.research.starter.cells.paint_emboli", painted_and_kept)
    background = whole_chest(enhanced)
    path = tmp_path / "many.npy"
    write_painted_slabs(background.volume, background.arteries, np.random.default_rng(2), path)
    records, study = np.load(path), kept["study"]
    assert len(study.emboli) > 1
    size = background.volume.shape[1]
    slices = np.flatnonzero(study.emboli_mask.voxels.any((1, 2)))
    assert len(records) == len(slices)
    for record, index in zip(records, slices, strict=True):
        image = sitk.GetImageFromArray((study.emboli_mask.voxels[index] > 0).astype(np.float32))
        grid = sitk.Image(512, 512, sitk.sitkFloat32)
        grid.SetOrigin([(size / 512 - 1) / 2] * 2)
        grid.SetSpacing([size / 512] * 2)
        clot = sitk.GetArrayFromImage(sitk.Resample(image, grid))[64:448, 64:448] >= 0.5
        mine = np.array([[clot[r : r + 16, c : c + 16].sum() for c in range(0, 384, 16)] for r in range(0, 384, 16)])
        assert np.abs(record["pixels"].astype(int) - mine).max() <= 3  # the edges of two interpolations
        hu = record["slab"][2].astype(np.float32) * 1524 - 1024
        assert hu[clot].mean() < hu[128:256, 128:256].max() - 50


@pytest.fixture
def labelled_slabs():
    """Slabs that show their own target: a clot cell is as bright as its number of pixels says."""
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (12, 24, 24), generator=draw).float()
    pixels *= torch.rand(12, 24, 24, generator=draw) < 0.02
    slabs = F.interpolate(pixels[:, None], scale_factor=16, mode="nearest").expand(12, 5, 384, 384) / 256
    return SlabItem(slabs, pixels, (pixels >= LEAST_PIXELS).flatten(1).any(1).long(), torch.arange(12))


def test_windows_keep_slabs_and_cells_together_and_every_other_one_holds_a_clot(labelled_slabs):
    windows = random_windows(labelled_slabs, 6, torch.Generator().manual_seed(0))
    assert windows.slab.shape == (12, 5, 96, 96)
    assert torch.equal(windows.slab[:, 2, ::16, ::16] * 256, windows.target)
    assert windows.label.tolist() == [int((target >= 12).any()) for target in windows.target]
    assert windows.label[::2].all()


def test_random_changes_keep_slabs_and_cells_together(labelled_slabs):
    windows = random_windows(labelled_slabs, 6, torch.Generator().manual_seed(0))
    changed = changed_at_random(windows, torch.Generator().manual_seed(1))
    bright = changed.slab[:, 2].unfold(1, 16, 16).unfold(2, 16, 16).mean((-1, -2))
    for before, after, shown in zip(windows.target, changed.target, bright, strict=True):
        assert sorted(after.flatten().tolist()) == sorted(before.flatten().tolist())
        if (after > 100).any():
            assert shown[after > 100].min() > shown[after == 0].max()
    assert not torch.equal(changed.target, windows.target)


def test_the_loss_of_cells_asks_those_that_are_clear_and_weighs_clots_more():
    torch.manual_seed(0)
    judge = CellJudge(SlabEncoder(EncoderConfig(width=8))).eval()
    pixels = torch.zeros(2, 4, 4)
    pixels[0, 1, 2], pixels[0, 3, 3] = 200, 5  # a clot, and a cell that shows too little of one to be asked
    items = SlabItem(torch.rand(2, 5, 64, 64), pixels, torch.tensor([1, 0]), torch.arange(2))
    columns = score_cells(judge, items, "float32")
    features = judge.encoder(items.slab).features.detach()
    weight = (judge.encoder.fc.weight[1] - judge.encoder.fc.weight[0]).detach()
    for number in range(2):
        terms = []
        for row, column in itertools.product(range(4), repeat=2):
            logit = float(features[number, :, row, column] @ weight) - 4.0
            asked = pixels[number, row, column] in (0, 200)
            clot = pixels[number, row, column] == 200
            if asked:
                terms.append(RARE * math.log1p(math.exp(-logit)) if clot else math.log1p(math.exp(logit)))
        assert columns["cell_loss"][number].item() == pytest.approx(np.mean(terms), rel=1e-4)


def test_the_first_lesson_leaves_a_model_to_train_on_and_is_not_repeated(tmp_path):
    kind = [("slab", np.float16, (5, 384, 384)), ("pixels", np.uint16, (24, 24))]
    for name in ("train", "validation"):
        records = np.zeros(4, kind)
        records["slab"] = np.random.default_rng(0).random((4, 5, 384, 384))
        records["pixels"][:, 7, 9] = 100
        np.save(tmp_path / f"{name}.npy", records)
    out = tmp_path / "cells.safetensors"
    steps = []
    settings = CellTraining(epochs=1, batch=4, window_cells=4)
    for _ in range(2):
        train_cells([tmp_path / "train.npy"], [tmp_path / "validation.npy"], out, settings, steps.append)
        steps.append("end")
    assert steps.index("end") > 0
    assert steps[-1] == steps[-2] == "end"  # no step the second time
    assert Detector.load(out).card.encoder is None  # it knows clots, but is no trained stage I yet
