"""The recipe of the starter model: windows, what their cells show, and the file that comes of it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from vessel_trees import branching_masks, write_masks

from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig, SlabEncoder
from pe_app.model.study_classifier import PooledClassifier
from pe_app.research.starter.figures import Clot, Seen, SeenPair, figures
from pe_app.research.starter.ingredients import bright_vessels, write_drawn, write_real
from pe_app.research.starter.lesson import LessonSettings, learn, lesson_loss, scores
from pe_app.research.starter.publish import calibrated, prepared_pairs, seen_pairs, study_probability
from pe_app.research.starter.whole_studies import render_pair
from pe_app.research.starter.windows import Batch, Patient, WindowSettings, WindowSource, cell_targets


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ingredients of a drawn patient and of a real one, whose CT the first one's rendering stands in for."""
    folder = tmp_path_factory.mktemp("starter")
    write_masks(folder / "vessels", "one")
    write_drawn(folder / "vessels", "one", folder / "drawn")
    pair = render_pair(Patient(folder / "drawn" / "one"), "real_0", seed=3)
    hu = np.asarray(pair.without.voxels, np.float32)
    arteries = np.asarray(Patient(folder / "drawn" / "one").arrays["arteries"]) > 127
    write_real("two", hu, arteries, folder / "real")
    return folder


@pytest.fixture
def patients(data) -> list[Patient]:
    return [Patient(data / "drawn" / "one"), Patient(data / "real" / "two")]


SMALL = WindowSettings(side=64, pairs=2, others=2, real_share=0.5)


def test_twins_differ_in_their_clot_only_and_only_clots_that_show_are_asked_for(patients):
    source = WindowSource(patients, 1, SMALL)
    asked = 0
    for _ in range(6):
        batch = source.batch()
        assert batch.slabs.shape == (6, 5, 64, 64)
        assert batch.target.shape == (6, 4, 4)
        assert batch.groups.tolist() == [0, 0, 2, 2, 4, 5]
        for row in (0, 2):
            changed = (batch.slabs[row] - batch.slabs[row + 1]).abs().amax(0).reshape(4, 16, 4, 16).amax((1, 3))
            assert (changed[batch.target[row] == 0] == 0).float().mean() > 0.7  # blur reaches the next cell
            assert changed[batch.target[row] == 0].max() < 0.1
            assert (changed[batch.target[row] == 1] > 0.02).all()
            assert (batch.target[row + 1] == 0).all()
            asked += int((batch.target[row] == 1).sum())
        assert (batch.target[4:] == 0).all()
    assert asked > 6


def test_targets_are_those_of_counting_pixels():
    rng = np.random.default_rng(0)
    clots = torch.from_numpy((rng.random((3, 5, 32, 32)) < 0.03).astype(np.float32))
    clots[:, :, :16, :16] = 0
    clots[0, 2, 16:24, 16:24] = 1
    clots[1, 0, 16:, 16:] = 1
    seen = clots * 0.5
    for target, clot in zip(cell_targets(clots, seen), clots.numpy(), strict=True):
        for row, column in np.ndindex(2, 2):
            cell = clot[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            most = max(cell[k].sum() for k in (1, 2, 3)) / 2
            assert target[row, column] == (1 if most >= 8 else 0 if cell.sum() == 0 else -1)


def test_the_loss_is_cross_entropy_of_cells_and_of_windows_by_their_strongest_ones():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 4)
    target = torch.zeros(3, 4, 4)
    target[0, 1, 1], target[1, 0, 0] = 1, -1
    settings = LessonSettings(rare=5.0, slab_weight=0.2, strongest=3)
    cells = weight = 0.0
    for logit, wanted in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True):
        if wanted >= 0:
            rare = 5.0 if wanted else 1.0
            cells -= rare * math.log(1 / (1 + math.exp(-logit if wanted else logit)))
            weight += rare
    windows = [sum(sorted(logits[row].flatten().tolist())[-3:]) / 3 for row in (0, 2)]  # the second is not known
    slabs = (math.log(1 + math.exp(-windows[0])) + math.log(1 + math.exp(windows[1]))) / 2
    assert float(lesson_loss(logits, target, settings)) == pytest.approx(cells / weight + 0.2 * slabs, rel=1e-5)


def test_scores_rank_windows_with_clots_against_their_twins():
    class Brightest(SlabEncoder):
        def forward(self, slabs):
            features = torch.zeros(len(slabs), 512, slabs.shape[2] // 16, slabs.shape[3] // 16)
            features[:, 0] = torch.nn.functional.max_pool2d(slabs[:, 2:3], 16)[:, 0]
            return type("Encoded", (), {"features": features})

    encoder = Brightest()
    torch.nn.init.zeros_(encoder.fc.weight)
    torch.nn.init.zeros_(encoder.fc.bias)
    encoder.fc.weight.data[1, 0] = 1
    slabs, target = torch.zeros(3, 5, 32, 32), torch.zeros(3, 2, 2)
    slabs[0, 2, 20, 5], slabs[1, 2, 3, 3], slabs[2, 2, 3, 3] = 0.9, 0.2, 0.95
    target[0, 1, 0] = 1
    batch = Batch(slabs, target, torch.tensor([0.1, 0.0, 0.0]), torch.tensor([0, 0, 2]), pairs=1)
    found = scores(encoder, [batch])
    assert (found["twin"], found["any"], found["pointing"], found["small"]) == (1.0, 0.5, 1.0, 1.0)


@pytest.mark.timeout(600)
def test_training_resumes_where_it_was_interrupted(data, tmp_path, patients):
    settings = LessonSettings(steps=3, every=1, warm_up=1, windows=SMALL)
    start = SlabEncoder(EncoderConfig()).state_dict()
    pools = {"drawn": [WindowSource(patients, 2, SMALL).batch()]}
    learn(tmp_path, [data / "drawn"], [], start, settings, pools, until=0)  # at once: after one step
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 1
    learn(tmp_path, [data / "drawn"], [], start, settings, pools)
    resumed = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert resumed["step"] == 3
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    changed = [not torch.equal(saved["encoder"][name], value) for name, value in resumed["encoder"].items()]
    assert any(changed)


def test_bright_vessels_of_a_chest_are_found_at_the_lungs():
    labels, lungs = branching_masks()
    hu = np.full(labels.shape, 40, np.float32)
    hu[lungs > 0] = -850
    hu[:, 60:66, 40:46] = 300  # a vessel through the right lung
    hu[:, :4] = hu[:, -4:] = hu[:, :, :4] = hu[:, :, -4:] = -1000
    found = bright_vessels(hu)
    assert found[:, 61:65, 41:45].mean() > 0.9
    assert found.sum() < 1.5 * 36 * len(hu)


def seen_with(cells: dict[tuple[int, int, int], float], noise: np.random.Generator) -> Seen:
    grid = noise.normal(-6, 0.5, (50, 24, 24)).astype(np.float32)
    for place, logit in cells.items():
        grid[place] = logit
    return Seen(grid, np.diag([11.2, 11.2, 5.0, 1.0])[[0, 1, 2, 3]][:, [2, 1, 0, 3]])


def made_up_pairs(patients: int, each: int) -> list[SeenPair]:
    """Clots show as cells of 2 to 5; every study has a cell of -3 to 0 elsewhere."""
    rng = np.random.default_rng(0)
    pairs = []
    for patient in range(patients):
        for _ in range(each):
            slab, row, column = (int(v) for v in rng.integers((2, 2, 2), (48, 22, 22)))
            stray = (int(rng.integers(50)), 0, 0)
            other = float(rng.uniform(-3, 0))
            clot = {(slab, row, column): float(rng.uniform(2, 5)), stray: other}
            place = np.array([[column * 11.2, row * 11.2, slab * 5.0]])
            pairs.append(
                SeenPair(str(patient), seen_with(clot, rng), seen_with({stray: other}, rng), (Clot(1.0, place),))
            )
    return pairs


def test_figures_of_a_detector_that_sees_every_clot_and_of_one_that_guesses():
    pairs = made_up_pairs(4, 3)
    found = figures(pairs, lambda seen: float(seen.probabilities.max()), 0.6)
    assert found["study AUC"][0] == found["pointing"][0] == found["found 0.3 to 3 ml"][0] == 1.0
    assert found["by luck 0.3 to 3 ml"][0] == found["pointing by luck"][0] == 0.0
    assert found["specificity"] == (1.0, 1.0, 1.0)
    # of the three slabs that the clot reaches, one shows it: 1 for that, 1/2 for the others
    assert found["slab AUC, matched pairs at the same level, 1 to 3 ml"][0] == pytest.approx(2 / 3, abs=0.06)
    swapped = [SeenPair(pair.patient, pair.without, pair.with_clots, pair.clots) for pair in pairs]
    guessed = figures(swapped, lambda seen: float(seen.probabilities.max()), 0.6)
    assert (guessed["study AUC"][0], guessed["by luck 0.3 to 3 ml"][0]) == (0.0, 1.0)


def test_calibration_leaves_few_false_candidates_and_a_threshold_that_others_keep():
    torch.manual_seed(0)
    weights = SlabEncoder(EncoderConfig()).state_dict()
    made = calibrated(weights, made_up_pairs(4, 6))
    assert isinstance(made.detector.classifier, PooledClassifier)
    shifted = [pair.shifted(made.offset) for pair in made_up_pairs(4, 6)]
    assert np.mean([len(pair.without.candidates_mm) for pair in shifted]) <= 2.0
    assert all(len(pair.with_clots.candidates_mm) for pair in shifted)
    found = figures(shifted, lambda seen: study_probability(made.detector, seen), made.detector.decision.threshold)
    assert found["specificity"][0] >= 0.8
    assert found["sensitivity"][0] == 1.0
    difference = made.detector.encoder.fc.bias - weights["fc.bias"]
    assert float(difference[1] - difference[0]) == pytest.approx(made.offset, abs=1e-5)


@pytest.mark.timeout(600)
def test_the_file_judges_whole_studies_as_it_was_measured(data, tmp_path):
    files = prepared_pairs(tmp_path, [data / "drawn" / "one"], ["real_0", "real_1"], lambda _: None)
    assert prepared_pairs(tmp_path, [data / "drawn" / "one"], ["real_0", "real_1"], lambda _: None) == files
    torch.manual_seed(0)
    encoder = SlabEncoder(EncoderConfig()).eval()
    (first, second) = seen_pairs(encoder, files)
    other = SeenPair("another", second.with_clots, second.without, second.clots)
    made = calibrated(encoder.state_dict(), [first, other])
    made.detector.save(tmp_path / "model.safetensors")
    loaded = Detector.load(tmp_path / "model.safetensors")
    with np.load(files[0]) as saved:
        pixels = torch.from_numpy(saved["with_clots"].astype(np.float32))
    with torch.inference_mode():
        features = loaded.encoder(pixels).features.half()
    measured = study_probability(made.detector, first.with_clots.shifted(made.offset))
    assert loaded.classify(features) == pytest.approx(measured, abs=0.03)  # bfloat16 against float32
