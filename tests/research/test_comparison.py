"""The comparison on studies that train in seconds; scikit-learn and counting by hand are the oracles."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from small_studies import SLABS, small_chest, small_studies
from typer.testing import CliRunner

from pe_app.cli import app
from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled, silent
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume_io import write_volume
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig, SlabEncoder
from pe_app.model.study_classifier import ClassifierConfig, StudyClassifier
from pe_app.research.baselines.cnn3d import CNN3DConfig
from pe_app.research.baselines.penet import PENetConfig
from pe_app.research.benchmark import Truth
from pe_app.research.comparison.page import rows, write_comparison
from pe_app.research.comparison.run import Outcome, compare, finished
from pe_app.research.comparison.systems import SYSTEMS, Plan, choose_systems, core_studies, small_plan
from pe_app.studies import Study
from pe_app.training.fine_tuning import FineTuning, JointNetwork
from pe_app.training.stages import ClassifierTraining, EncoderTraining

TINY = Plan(
    replace(SLABS, slab_spacing="physical"),
    EncoderConfig(width=8),
    filters=4,
    encoder=EncoderTraining(epochs=1, batch=8, learning_rate=3e-3, negative_slabs="matched", fresh_statistics=True),
    classifier=ClassifierTraining(epochs=1, batch=4, learning_rate=3e-3),
    fine_tuning=FineTuning(epochs=1, batch=2, gradient_slabs=2),
    penet=PENetConfig(slices=8, resize=48, crop=32, stride=8, width=16, groups=4, blocks=(1, 1, 1, 1)),
    cnn3d=CNN3DConfig(width=8, filters=4),
)
NAMES = ("scenario1", "scenario2", "slab_mean", "slab_maximum", "penet", "cnn3d", "end_to_end")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """Fourteen small studies: four for the test, and one annotated study in five made label-only."""
    folder = tmp_path_factory.mktemp("listed")
    studies = list(small_studies(folder, count=14))
    for number in range(0, 14, 2):
        write_volume(small_chest(number, 3)[1], folder / "masks" / f"study{number}.nrrd")
    sides = ["train"] * 6 + ["validation"] * 4 + ["test"] * 4
    studies = [replace(study, split=side) for study, side in zip(studies, sides, strict=True)]
    studies[4] = replace(studies[4], annotation=None)
    return tuple(studies)


@pytest.fixture(scope="module")
def compared(listed, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    masks = listed[0].path.parent / "masks"
    outcomes = compare(listed, out, choose_systems(NAMES), TINY, [0], masks, synthetic=True)
    return out, outcomes


def test_every_system_says_something_of_every_test_study(compared, listed):
    _, outcomes = compared
    assert [outcome.system for outcome in outcomes] == [s.name for s in SYSTEMS if s.name in ("scenario3", *NAMES)]
    for outcome in outcomes:
        assert outcome.studies == ("study10", "study11", "study12", "study13")
        assert outcome.labels == (True, False, True, False)
        assert all(0 <= value <= 1 for value in outcome.probabilities)


def test_scenario_1_learns_from_fewer_studies_than_scenario_3(compared):
    _, outcomes = compared
    learned = {outcome.system: outcome.training_studies for outcome in outcomes}
    assert learned["scenario3"] == learned["scenario2"] == learned["cnn3d"] == 10
    assert learned["scenario1"] < 10


def test_the_3d_networks_look_at_as_many_slices_as_both_stages(compared, listed):
    out, _ = compared
    train = [study for study in listed if study.split == "train"]
    marked = sum(study.annotation.read_text().count('"embolism"') for study in train if study.annotation)
    slabs = 2 * marked  # as many without embolism
    stage_two = len(train) * SLABS.slab_count * 4
    budget = TINY.encoder.epochs * slabs * 5 + TINY.classifier.epochs * stage_two
    for system, slices in (("penet", slabs * TINY.penet.slices), ("cnn3d", stage_two)):
        status = json.loads((out / "seed0" / system / "run" / "status.json").read_text())
        assert len(status["history"]) == round(budget / slices)


def test_the_table_is_that_of_scikit_learn(compared):
    out, outcomes = compared
    write_comparison(outcomes, choose_systems(NAMES), out, {}, synthetic=True)
    written = {row["system"]: row for row in csv.DictReader((out / "comparison.csv").open())}
    for outcome in outcomes:
        expected = roc_auc_score(outcome.labels, outcome.probabilities)
        assert float(written[outcome.system]["auc"]) == pytest.approx(expected, abs=1e-4)
    page = (out / "index.html").read_text()
    assert "Research use only" in page
    assert "do not apply to patients" in page
    assert "://" not in page  # nothing is loaded
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_comparison_is_returned_at_once_and_another_plan_is_refused(compared, listed, monkeypatch):
    out, outcomes = compared
    assert set(finished(out)) == set(outcomes)
    monkeypatch.setattr("pe_app.research.comparison.run.train_encoder", None)
    assert compare(listed, out, choose_systems(NAMES), TINY, [0], listed[0].path.parent / "masks") == outcomes
    with pytest.raises(InputError, match="another settings"):
        compare(listed, out, choose_systems(NAMES), replace(TINY, filters=5), [0])
    with pytest.raises(InputError, match="another study list"):
        compare(listed[1:], out, choose_systems(NAMES), TINY, [0])


def test_an_interrupted_comparison_goes_on_and_says_the_same(compared, listed, tmp_path):
    def stop_in_stage_two(progress):
        if progress.task == "train classifier" and progress.done == 2:
            raise Cancelled

    masks = listed[0].path.parent / "masks"
    chosen = choose_systems(["slab_mean"])
    with pytest.raises(Cancelled):
        compare(listed, tmp_path, chosen, TINY, [0], masks, True, stop_in_stage_two)
    _, outcomes = compared
    expected = {outcome.system: outcome.probabilities for outcome in outcomes}
    for outcome in compare(listed, tmp_path, chosen, TINY, [0], masks, True, silent):
        assert outcome.probabilities == expected[outcome.system]


def test_features_are_gone_when_no_system_needs_them(compared):
    out, _ = compared
    assert not list(out.glob("seed0/features-*"))
    assert len(list(out.glob("seed0/encoder-*.safetensors"))) == 2  # with and without attention loss


def test_an_unknown_system_is_named():
    with pytest.raises(InputError, match="unknown system 'resnet'"):
        choose_systems(["resnet"])


@pytest.mark.parametrize(("matrix", "crop", "slabs"), [(256, 100, 24), (128, 192, 24), (256, 192, 15)])
def test_sizes_that_do_not_fit_the_networks_are_refused_in_words(matrix, crop, slabs):
    with pytest.raises(InputError, match="multiple of 64"):
        small_plan(matrix, crop, slabs)


def test_the_default_plan_is_the_papers_but_for_the_matched_negatives():
    plan = Plan()
    assert replace(plan.encoder, negative_slabs="mixed") == EncoderTraining()
    assert (plan.slabs, plan.network, plan.filters) == (SlabConfig(), EncoderConfig(), ClassifierConfig().filters)
    assert plan.classifier == ClassifierTraining()
    assert replace(plan.baseline(8, 31), epochs=50, batch=32) == plan.classifier
    assert choose_systems(["scenario2"])[1].change(plan).encoder.attention_weight == 0


def test_stage_one_gets_the_papers_share_of_negative_studies_where_none_is_annotated(tmp_path):
    def study(number, label, annotated):
        annotation = tmp_path / f"{number}.json" if annotated else None
        return Study(f"s{number}", tmp_path / f"{number}.nrrd", label=label, annotation=annotation, split="train")

    studies = [study(n, "positive", True) for n in range(100)] + [study(n, "negative", False) for n in range(100, 200)]
    core = core_studies(studies)
    assert sum(entry.label == "negative" for entry in core) == round(100 * 593 / 1670)


def outcome(seed, probabilities, system="scenario3"):
    studies = tuple(f"s{number}" for number in range(len(probabilities)))
    labels = tuple(number % 2 == 0 for number in range(len(probabilities)))
    return Outcome(system, seed, studies, labels, tuple(probabilities), (None,) * len(labels), None, 1, 1, 1.0)


def test_what_a_system_learned_of_the_irrelevant_is_its_auc_for_it():
    rng = np.random.default_rng(0)
    probabilities = rng.random(40)
    truth = {
        f"s{number}": Truth(f"s{number}", "lead" if probabilities[number] > 0.4 else "", 0, 0, 0, number in (0, 2))
        for number in range(40)
    }
    row = rows([outcome(0, probabilities)], choose_systems(["scenario3"]), truth)[0]
    assert row.nuisance_auc == 1
    assert row.nuisance_aucs == {"lead": 1}  # the other kinds are not shown
    plain = probabilities <= 0.4
    assert row.plain_auc == pytest.approx(roc_auc_score((np.arange(40) % 2 == 0)[plain], probabilities[plain]))
    labels = np.arange(40) % 2 == 0
    tiny = ~labels | np.isin(np.arange(40), (0, 2))
    assert row.tiny_auc == pytest.approx(roc_auc_score(labels[tiny], probabilities[tiny]))


def test_the_mean_over_seeds_is_compared_with_that_of_the_reference():
    rng = np.random.default_rng(1)
    ours = [rng.random(40) for _ in range(3)]
    theirs = [rng.random(40) for _ in range(3)]
    outcomes = [outcome(seed, values) for seed, values in enumerate(ours)]
    outcomes += [outcome(seed, values, "scenario2") for seed, values in enumerate(theirs)]
    reference, other = rows(outcomes, choose_systems(["scenario2"]), {})
    labels = np.arange(40) % 2 == 0
    means = [np.mean([roc_auc_score(labels, run) for run in runs]) for runs in (ours, theirs)]
    assert reference.difference is None
    assert other.difference.value == pytest.approx(means[1] - means[0])
    assert reference.seeds.low < means[0] < reference.seeds.high


def test_only_the_chosen_slabs_carry_a_gradient_into_the_encoder():
    torch.manual_seed(0)
    detector = Detector.untrained(0, SLABS, EncoderConfig(width=8))
    joint = JointNetwork(detector.encoder, detector.classifier).train()
    slabs = torch.rand(1, 6, 5, 64, 64, requires_grad=True)
    joint(slabs, torch.tensor([1, 4])).sum().backward()
    moved = slabs.grad.abs().sum((0, 2, 3, 4)) > 0
    assert moved.tolist() == [False, True, False, False, True, False]
    assert any(weight.grad is not None and weight.grad.any() for weight in detector.encoder.parameters())


def test_the_joint_network_is_both_stages_one_after_the_other():
    torch.manual_seed(0)
    detector = Detector.untrained(0, SLABS, EncoderConfig(width=8))
    encoder: SlabEncoder = detector.encoder.eval()
    classifier: StudyClassifier = detector.classifier.eval()
    slabs = torch.rand(2, 6, 5, 64, 64)
    with torch.no_grad():
        features = torch.stack([encoder(study).features for study in slabs])
        expected = classifier(features)
        found = JointNetwork(encoder, classifier).eval()(slabs, torch.tensor([0, 3]))
    assert torch.allclose(found, expected, atol=1e-5)


def test_fine_tuning_changes_both_stages_and_says_so_in_the_card(compared):
    out, _ = compared
    before = Detector.load(out / "seed0" / "scenario3" / "model.safetensors")
    after = Detector.load(out / "seed0" / "end_to_end" / "model.safetensors")
    assert after.card.classifier.settings["end_to_end"] is True
    for stage in ("encoder", "classifier"):
        old, new = getattr(before, stage).state_dict(), getattr(after, stage).state_dict()
        assert any(not torch.equal(old[name], new[name]) for name in old if name.endswith("weight"))
    statistics = [name for name in before.encoder.state_dict() if "running" in name]
    assert all(torch.equal(before.encoder.state_dict()[n], after.encoder.state_dict()[n]) for n in statistics)


def test_the_plan_is_written_beside_the_results(compared):
    out, _ = compared
    assert json.loads((out / "comparison.json").read_text())["plan"]["encoder"]["negative_slabs"] == "matched"


def test_the_commands_say_what_is_missing(tmp_path):
    nothing = CliRunner().invoke(app, ["phantom", "--out", str(tmp_path)])
    assert isinstance(nothing.exception, InputError)
    assert "--studies 8" in str(nothing.exception)
    (tmp_path / "list.csv").write_text("study,path\na,a.nrrd\n")
    words = ["compare", "--studies", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")]
    untested = CliRunner().invoke(app, words)
    assert "2 positive and 2 negative studies of split 'test'" in str(untested.exception)
    assert not (tmp_path / "out").exists()
