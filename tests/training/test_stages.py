import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from small_studies import CLASSIFIER, ENCODER, SLABS, small_studies
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from pe_app.annotation.sparse import ReviewedSlice, SparseAnnotation
from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled, Progress, silent
from pe_app.ct.volume_io import read_volume
from pe_app.model.detector import Detector
from pe_app.model.losses import AttentionLoss, attention_loss
from pe_app.model.slab_encoder import EncoderConfig, SlabEncoder
from pe_app.model.study_classifier import PooledClassifier, StudyClassifier
from pe_app.studies import Study
from pe_app.training import run as training_run
from pe_app.training.datasets import SlabItem, StudyItem, prepare_slabs, read_sources
from pe_app.training.loop import _Clock, _estimate_statistics, _Scorer, derived_seed, learning_rate
from pe_app.training.run import TrainingRun, metrics_csv
from pe_app.training.stages import (
    ClassifierTraining,
    EncoderTraining,
    score_slabs,
    split,
    train_classifier,
    train_encoder,
)

LEARNING = EncoderTraining(epochs=8, batch=8, learning_rate=2e-3, precision="float32")
QUICK = EncoderTraining(epochs=2, batch=16, learning_rate=3e-3, precision="float32", augment=True)
QUICK_CLASSIFIER = ClassifierTraining(epochs=2, batch=4, learning_rate=3e-3, precision="float32")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> tuple[Study, ...]:
    return small_studies(tmp_path_factory.mktemp("studies"), count=12, every=2)


def encoder(studies, out: Path, settings: EncoderTraining = QUICK, progress=silent, **more) -> Detector:
    shapes = {"slabs": SLABS, "network": ENCODER, "classifier": CLASSIFIER}
    return train_encoder(studies, out, settings=settings, progress=progress, **{**shapes, **more})


@dataclass
class Trained:
    detector: Detector
    out: Path
    reports: list[Progress]

    @property
    def run(self) -> Path:
        return self.out.with_suffix(".run")

    @property
    def rows(self) -> list[dict[str, float]]:
        with (self.run / "metrics.csv").open() as file:
            return [{k: float(v) if v else math.nan for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def stage1(studies, tmp_path_factory) -> Trained:
    """A stage I that has learned: 8 passes over some 100 slabs."""
    out = tmp_path_factory.mktemp("stage1") / "encoder.safetensors"
    reports: list[Progress] = []
    return Trained(encoder(studies, out, LEARNING, reports.append, synthetic=True), out, reports)


@pytest.fixture(scope="module")
def quick1(studies, tmp_path_factory) -> Trained:
    """Two uninterrupted epochs with every source of chance switched on: what interrupted runs are held against."""
    out = tmp_path_factory.mktemp("quick1") / "encoder.safetensors"
    reports: list[Progress] = []
    return Trained(encoder(studies, out, QUICK, reports.append), out, reports)


@pytest.fixture(scope="module")
def quick2(studies, stage1, tmp_path_factory) -> Trained:
    out = tmp_path_factory.mktemp("quick2") / "model.safetensors"
    reports: list[Progress] = []
    detector = train_classifier(studies, stage1.out, out, settings=QUICK_CLASSIFIER, progress=reports.append)
    return Trained(detector, out, reports)


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in ("seconds", "waiting")} for row in rows]


def stop_after(task: str, steps: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.task == task and progress.done >= steps:
            raise Cancelled("enough")

    return stop


# Learning


def test_stage_one_learns_where_the_emboli_are(stage1, studies):
    rows = stage1.rows
    assert rows[-1]["loss"] < 0.4 * rows[0]["loss"]
    assert rows[-1]["attention_loss"] < 0.4 * rows[0]["attention_loss"]
    validation = [s for s in split(studies, EncoderTraining()) if s.split == "validation"]
    slabs = prepare_slabs(read_sources(validation), SLABS, stage1.run / "slabs", derived_seed(0, "draw", "validation"))
    chance = np.mean([item.target.mean() for item in slabs if item.label == 1])
    best = rows[stage1.detector.card.encoder.best_epoch - 1]
    assert best["validation_pointing"] > chance + 0.3
    assert best["validation_auc"] > 0.8


def test_cells_with_a_decision_by_the_strongest_ones_learn_where_the_emboli_are_too(studies, tmp_path):
    settings = replace(LEARNING, attention_loss=AttentionLoss("cells"))
    network = replace(ENCODER, strongest_cells=2)
    detector = encoder(studies, tmp_path / "cells.safetensors", settings, network=network)
    rows = Trained(detector, tmp_path / "cells.safetensors", []).rows
    assert rows[-1]["attention_loss"] < 0.5 * rows[0]["attention_loss"]
    assert max(row["validation_pointing"] for row in rows) > 0.5
    with pytest.raises(InputError, match="strongest_cells"):
        encoder(studies, tmp_path / "mean.safetensors", settings)


def test_the_share_of_empty_maps_does_not_grow(stage1):
    shares = [row["empty_maps"] for row in stage1.rows]
    assert shares[-1] <= shares[0]
    assert max(shares[4:]) < 0.05
    assert stage1.rows[stage1.detector.card.encoder.best_epoch - 1]["validation_empty_maps"] < 0.2


def test_stage_two_learns_from_labels_and_leaves_the_encoder_alone(studies, stage1, tmp_path):
    settings = ClassifierTraining(epochs=6, batch=4, learning_rate=3e-3, precision="float32")
    out = tmp_path / "model.safetensors"
    detector = train_classifier(studies, stage1.out, out, settings=settings)
    rows = Trained(detector, out, []).rows
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert same(detector.encoder, Detector.load(stage1.out).encoder)
    assert not same(detector.classifier, stage1.detector.classifier)
    assert detector.card.trained
    assert detector.card.encoder == stage1.detector.card.encoder


def test_pooled_evidence_tells_studies_apart_after_one_epoch_and_survives_its_file(studies, stage1, tmp_path):
    settings = ClassifierTraining(pooled=True, epochs=9, precision="float32")
    detector = train_classifier(studies, stage1.out, tmp_path / "model.safetensors", settings=settings)
    rows = Trained(detector, tmp_path / "model.safetensors", []).rows
    assert len(rows) == 1
    assert rows[0]["loss"] < 0.6  # ln 2 knows nothing
    assert isinstance(detector.classifier, PooledClassifier)
    loaded = Detector.load(tmp_path / "model.safetensors")
    assert isinstance(loaded.classifier, PooledClassifier)
    assert same(loaded.classifier, detector.classifier)
    # trained again without the option it is the paper's stage II
    again = train_classifier(
        studies, tmp_path / "model.safetensors", tmp_path / "b.safetensors", settings=QUICK_CLASSIFIER
    )
    assert isinstance(again.classifier, StudyClassifier)


def test_one_step_of_training_is_one_step_of_adam_on_the_mean_loss(studies, tmp_path):
    settings = replace(QUICK, epochs=1, batch=1000, augment=False, attention_weight=0.7)
    detector = encoder(studies, tmp_path / "encoder.safetensors", settings)

    network = Detector.untrained(0, SLABS, ENCODER, CLASSIFIER).encoder.train()
    train = [s for s in split(studies, settings) if s.split == "train"]
    slabs = prepare_slabs(read_sources(train), SLABS, tmp_path / "slabs", derived_seed(0, "draw", "train"))
    slab, target, label, _ = (torch.stack(column) for column in zip(*slabs, strict=True))
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    encoded = network(slab)
    attention = attention_loss(network.attention_map(encoded.features), target, label)
    (F.cross_entropy(encoded.logits, label) + 0.7 * attention.mean()).backward()
    optimiser.step()
    for name, value in weights(network).items():
        moved = (value - weights(detector.encoder)[name]).abs()
        # Adam's first step is the sign of the gradient times the rate: where a gradient is all rounding, signs differ
        assert (moved > 1e-4).float().mean() < 0.02, name


@pytest.mark.parametrize("kind", ["continuous_dice", "soft_dice", "mse"])
@pytest.mark.parametrize("negatives", ["smoothed", "mean", "none"])
@pytest.mark.parametrize("score", ["difference", "positive_logit"])
def test_every_kind_of_attention_loss_trains(kind, negatives, score):
    torch.manual_seed(0)
    network = SlabEncoder(EncoderConfig(width=4, attention_score=score))
    settings = EncoderTraining(attention_loss=AttentionLoss(kind, negatives), attention_weight=0.5, precision="float32")
    target = torch.zeros(4, 4, 4)
    target[:2, 1, 2] = 1
    items = SlabItem(torch.rand(4, 5, 64, 64), target, torch.tensor([1, 1, 0, 0]), torch.zeros(4))
    columns = score_slabs(network, items, settings)
    encoded = network(items.slab)
    cross = -encoded.logits.log_softmax(1)[torch.arange(4), items.label]
    attention = attention_loss(network.attention_map(encoded.features), target, items.label, settings.attention_loss)
    torch.testing.assert_close(columns["loss"], cross + 0.5 * attention)
    columns["loss"].mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


class Given(SlabEncoder):
    """An encoder whose maps are given."""

    maps: Tensor

    def attention_map(self, features: Tensor) -> Tensor:
        return self.maps


def test_pointing_and_empty_maps_are_those_of_slabs_with_embolism():
    network = Given(EncoderConfig(width=4))
    target = torch.zeros(4, 4, 4)
    target[:3, 1, 2] = 1
    network.maps = torch.zeros(4, 4, 4)
    network.maps[0, 1, 2], network.maps[0, 0, 0] = 2.0, 1.0  # a hit
    network.maps[1, 1, 2], network.maps[1, 0, 0] = 1.0, 2.0  # a miss
    items = SlabItem(torch.rand(4, 5, 64, 64), target, torch.tensor([1, 1, 1, 0]), torch.zeros(4))
    columns = score_slabs(network, items, EncoderTraining(precision="float32"))
    assert columns["pointing"][:3].tolist() == [1, 0, 0]
    assert columns["empty_maps"][:3].tolist() == [0, 0, 1]
    assert columns["pointing"][3].isnan()
    assert columns["empty_maps"][3].isnan()


def test_a_slab_that_is_not_outlined_teaches_classification_alone():
    torch.manual_seed(0)
    network = SlabEncoder(EncoderConfig(width=4))
    target = torch.zeros(4, 4, 4)
    target[0, 1, 2], target[1] = 1, -1
    items = SlabItem(torch.rand(4, 5, 64, 64), target, torch.tensor([1, 1, 0, 1]), torch.zeros(4))
    items = items._replace(target=items.target.index_copy(0, torch.tensor([3]), items.target[:1]))
    columns = score_slabs(network, items, EncoderTraining(precision="float32"))
    assert torch.equal(columns["loss"][1], columns["classification_loss"][1])
    assert (columns["loss"] > columns["classification_loss"])[[0, 3]].all()
    assert columns["attention_loss"].isnan().tolist() == [False, True, False, False]
    assert columns["pointing"].isnan().tolist() == [False, True, True, False]
    assert columns["empty_maps"].isnan().tolist() == [False, False, True, False]
    assert columns["label"].tolist() == [1, 1, 0, 1]


def without_outlines(study: Study, folder: Path) -> Study:
    """The study with the same answers and no outline."""
    annotation = SparseAnnotation.read(study.annotation)
    said = [replace(entry, not_outlined=entry.state == "embolism") for entry in annotation.slices]
    path = folder / f"{study.study}.json"
    replace(annotation, slices=tuple(said), masks={}).write(path, read_volume(study.path))
    return replace(study, annotation=path)


def test_stage_one_learns_from_slices_without_outlines_and_the_model_records_it(studies, tmp_path):
    listed = tuple(without_outlines(s, tmp_path) if s.study in ("study0", "study4") else s for s in studies)
    detector = encoder(listed, tmp_path / "encoder.safetensors", replace(QUICK, epochs=1))
    record = detector.card.encoder
    annotations = {s.study: SparseAnnotation.read(s.annotation) for s in listed if s.annotation}
    count = sum(entry.state == "embolism" for name in ("study0", "study4") for entry in annotations[name].slices)
    assert record.not_outlined_slices == count > 0
    assert record.annotated_slices == sum(len(annotation.slices) for annotation in annotations.values())
    assert Detector.load(tmp_path / "encoder.safetensors").card.encoder == record


def test_the_terms_of_use_of_public_data_stay_with_every_model_that_learned_from_it(studies, tmp_path):
    terms = "RSNA, non-commercial use only"
    listed = tuple(replace(s, source="rspect", terms=terms) if s.study == "study1" else s for s in studies)
    first = encoder(listed, tmp_path / "encoder.safetensors", replace(QUICK, epochs=1))
    assert Detector.load(tmp_path / "encoder.safetensors").card.terms == ("rspect: RSNA, non-commercial use only",)
    assert first.card.non_commercial
    later = train_encoder(
        studies,
        tmp_path / "later.safetensors",
        settings=replace(QUICK, epochs=1),
        start_from=tmp_path / "encoder.safetensors",
    )
    assert later.card.terms == first.card.terms
    both = train_classifier(
        studies, tmp_path / "later.safetensors", tmp_path / "both.safetensors", settings=QUICK_CLASSIFIER
    )
    assert both.card.terms == first.card.terms
    assert not encoder(studies, tmp_path / "own.safetensors", replace(QUICK, epochs=1)).card.non_commercial


def test_without_attention_weight_the_attention_is_logged_but_not_learned(studies, tmp_path):
    columns = []
    for weight in (0.0, 1.0):
        network = SlabEncoder(ENCODER)
        items = SlabItem(torch.rand(2, 5, 64, 64), torch.ones(2, 4, 4), torch.tensor([1, 0]), torch.zeros(2))
        columns.append(score_slabs(network, items, EncoderTraining(attention_weight=weight, precision="float32")))
    assert torch.equal(columns[0]["loss"], columns[0]["classification_loss"])
    assert (columns[0]["attention_loss"] > 0).any()
    assert (columns[1]["loss"] > columns[1]["classification_loss"]).any()


def test_the_learning_rate_falls_along_half_a_cosine_or_stays():
    constant, cosine = (replace(QUICK, epochs=4, schedule=schedule) for schedule in ("constant", "cosine"))
    assert [learning_rate(constant, epoch) for epoch in range(1, 5)] == [QUICK.learning_rate] * 4
    network = torch.nn.Linear(1, 1)
    optimiser = torch.optim.Adam(network.parameters(), lr=QUICK.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=4)
    for epoch in range(1, 5):
        assert learning_rate(cosine, epoch) == pytest.approx(scheduler.get_last_lr()[0])
        optimiser.step()
        scheduler.step()


def test_a_training_goes_on_from_the_weights_of_a_model(studies, stage1, tmp_path):
    still = replace(QUICK, epochs=1, learning_rate=1e-12, augment=False)
    out = tmp_path / "more.safetensors"
    going_on = train_encoder(studies, out, settings=still, start_from=stage1.out)
    for name, value in weights(stage1.detector.encoder).items():
        if "running" not in name and "tracked" not in name:
            assert torch.allclose(weights(going_on.encoder)[name], value, atol=1e-9), name
    assert going_on.slabs == SLABS  # not the defaults: those of the model
    assert going_on.card.encoder.settings["start_from"] == stage1.out.name
    assert not same(going_on.encoder, encoder(studies, tmp_path / "anew.safetensors", still).encoder)


def test_bfloat16_trains_weights_that_stay_float32(studies, tmp_path):
    settings = replace(QUICK, epochs=1, precision="bfloat16")
    detector = encoder(studies, tmp_path / "encoder.safetensors", settings)
    assert {value.dtype for value in detector.encoder.parameters()} == {torch.float32}
    assert all(value.isfinite().all() for value in detector.encoder.parameters())


# What is published and shown


def test_the_epoch_with_the_highest_validation_accuracy_is_published(stage1, studies):
    rows = stage1.rows
    best = max(rows, key=lambda row: (row["validation_accuracy"], -row["validation_loss"], -row["epoch"]))
    assert stage1.detector.card.encoder.best_epoch == best["epoch"]

    validation = [s for s in split(studies, EncoderTraining()) if s.split == "validation"]
    slabs = prepare_slabs(read_sources(validation), SLABS, stage1.run / "slabs", derived_seed(0, "draw", "validation"))
    published = Detector.load(stage1.out).encoder.eval()
    with torch.no_grad():
        logits = torch.cat([published(item.slab[None]).logits for item in slabs])
    assert (logits.argmax(1).numpy() == slabs.labels).mean() == pytest.approx(best["validation_accuracy"])
    assert roc_auc_score(slabs.labels, logits[:, 1] - logits[:, 0]) == pytest.approx(best["validation_auc"])


def test_the_model_card_says_what_it_was_trained_on(stage1, studies):
    record = Detector.load(stage1.out).card.encoder
    assert (record.studies, record.positive, record.synthetic, record.epochs, record.device) == (12, 6, True, 8, "cpu")
    assert record.annotated_slices == sum(len(SparseAnnotation.read(s.annotation).slices) for s in studies[::2])
    assert set(record.image_sha256) == {read_volume(study.path).sha256 for study in studies}
    assert record.settings["learning_rate"] == 2e-3
    assert record.settings["attention_loss.kind"] == "continuous_dice"
    assert record.settings["seed"] == 0
    assert record.metrics["validation_accuracy"] == stage1.rows[record.best_epoch - 1]["validation_accuracy"]
    assert record.seconds >= sum(row["seconds"] for row in stage1.rows) * 0.9
    assert Detector.load(stage1.out).card.classifier is None
    assert Detector.load(stage1.out).card.name == "encoder"


def test_metrics_of_every_epoch_are_on_disk(stage1, quick2):
    expected = {"loss", "classification_loss", "attention_loss", "accuracy", "empty_maps", "seconds"}
    expected |= {"validation_accuracy", "validation_auc", "validation_pointing", "validation_empty_maps"}
    assert expected <= stage1.rows[0].keys()
    assert [row["epoch"] for row in stage1.rows] == list(range(1, 9))
    assert {"loss", "accuracy", "validation_accuracy", "validation_auc", "seconds"} <= quick2.rows[0].keys()


def test_tensorboard_reads_the_same_metrics(stage1):
    events = EventAccumulator(str(stage1.run / "tensorboard")).Reload()
    for name, tag in (("validation_auc", "auc/validation"), ("loss", "loss/train")):
        logged = {event.step: event.value for event in events.Scalars(tag)}
        assert logged == pytest.approx({int(row["epoch"]): row[name] for row in stage1.rows}, rel=1e-6)


def test_curves_are_a_picture(stage1, quick2):
    for trained, width in ((stage1, 2000), (quick2, 1300)):
        picture = matplotlib.image.imread(trained.run / "curves.png")
        assert picture.shape[1] > width
        assert picture[..., :3].std() > 0.05


def test_status_tells_a_finished_training(stage1):
    status = json.loads((stage1.run / "status.json").read_text())
    assert (status["task"], status["state"], status["epoch"], status["epochs"]) == ("train encoder", "finished", 8, 8)
    assert status["done"] == status["total"]
    assert [entry["epoch"] for entry in status["history"]] == list(range(1, 9))
    assert status["metrics"] == status["history"][-1]


def test_the_share_of_time_without_data_is_measured_and_told(quick1, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pe_app.training.loop.time.perf_counter", lambda: now[0])

    def slow_batches():
        for batch in range(3):
            now[0] += 2
            yield batch

    clock = _Clock()
    for _ in clock.waiting_for(slow_batches()):
        now[0] += 6
    assert (clock.seconds, clock.waiting) == (24, 0.25)
    assert all(0 < row["waiting"] < 1 for row in quick1.rows)
    assert "waiting" not in quick1.detector.card.encoder.metrics
    told = [report.text for report in quick1.reports if report.task == "train encoder"]
    assert all(re.search(r", waiting \d+%$", text) for text in told)


def test_a_run_of_a_former_version_goes_on_in_a_table_of_whole_rows():
    text = metrics_csv([{"epoch": 1, "seconds": 2.0}, {"epoch": 2, "seconds": 3.0, "waiting": 0.5}])
    assert list(csv.reader(text.splitlines())) == [
        ["epoch", "seconds", "waiting"],
        ["1", "2.0", ""],
        ["2", "3.0", "0.5"],
    ]


def test_progress_counts_the_steps_of_the_whole_training(quick1):
    steps = [report for report in quick1.reports if report.task == "train encoder"]
    assert [report.done for report in steps] == list(range(1, steps[0].total + 1))
    assert len({report.total for report in steps}) == 1
    assert "epoch 2 of 2, loss" in steps[-1].text


def test_a_figure_that_is_not_defined_is_empty_in_csv_and_null_in_status(tmp_path):
    network = torch.nn.Linear(1, 1)
    metrics = {"epoch": 1, "loss": 1.0, "validation_loss": 1.0, "accuracy": 0.5, "validation_accuracy": 0.5}
    with TrainingRun(tmp_path, "train classifier", 1, silent) as run:
        run.finish_epoch(network, torch.optim.Adam(network.parameters()), {**metrics, "validation_auc": math.nan})
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1].endswith(",0.5,")
    assert json.loads((tmp_path / "status.json").read_text())["metrics"]["validation_auc"] is None


def test_of_equally_accurate_epochs_the_one_with_the_lower_validation_loss_is_best(tmp_path):
    network = torch.nn.Linear(1, 1)
    with TrainingRun(tmp_path, "train classifier", 4, silent) as run:
        for epoch, (accuracy, loss) in enumerate([(0.5, 0.1), (0.9, 0.8), (0.9, 0.7), (0.9, 0.7)], start=1):
            network.weight.data.fill_(epoch)
            figures = {"epoch": epoch, "loss": 1.0, "accuracy": 1.0, "validation_loss": loss}
            run.finish_epoch(
                network, torch.optim.Adam(network.parameters()), {**figures, "validation_accuracy": accuracy}
            )
    assert run.state.best_epoch == 3
    assert run.state.best_weights["weight"].item() == 3


# Going on after an interruption


@pytest.mark.parametrize("place", ["in the first epoch", "at the border", "in the second epoch", "in the last step"])
def test_a_cancelled_stage_one_goes_on_bit_by_bit(studies, quick1, tmp_path, place):
    total = next(report.total for report in quick1.reports if report.task == "train encoder")
    steps = {"in the first epoch": 2, "at the border": total // 2, "in the second epoch": total // 2 + 2}
    out = tmp_path / "encoder.safetensors"
    with pytest.raises(Cancelled):
        encoder(studies, out, progress=stop_after("train encoder", steps.get(place, total)))
    status = json.loads((out.with_suffix(".run") / "status.json").read_text())
    assert (status["state"], status["text"]) == ("stopped", "enough")
    assert not out.exists()  # a former model would still be served

    resumed = Trained(encoder(studies, out), out, [])
    assert same(resumed.detector.encoder, quick1.detector.encoder)
    assert timeless(resumed.rows) == timeless(quick1.rows)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_cancelled_stage_two_goes_on_bit_by_bit(studies, stage1, quick2, tmp_path, steps):
    out = tmp_path / "model.safetensors"
    cache = quick2.run / "features"

    def train(progress=silent) -> Detector:
        settings = QUICK_CLASSIFIER
        return train_classifier(studies, stage1.out, out, settings=settings, cache_dir=cache, progress=progress)

    with pytest.raises(Cancelled):
        train(stop_after("train classifier", steps))
    resumed = Trained(train(), out, [])
    assert same(resumed.detector.classifier, quick2.detector.classifier)
    assert timeless(resumed.rows) == timeless(quick2.rows)


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from pe_app.studies import read_studies
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from test_stages import encoder

def kill(progress):
    if progress.task == "train encoder" and progress.done == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

encoder(read_studies(sys.argv[1]), Path(sys.argv[2]), progress=kill)
"""


def test_a_killed_training_goes_on_bit_by_bit(studies, quick1, tmp_path):
    from pe_app.studies import write_studies

    total = next(report.total for report in quick1.reports if report.task == "train encoder")
    out, here = tmp_path / "encoder.safetensors", Path(__file__).parent
    write_studies(studies, tmp_path / "studies.csv")
    arguments = [str(tmp_path / "studies.csv"), str(out), str(here), str(total // 2 + 2)]
    places = os.pathsep.join(map(str, (here.parents[1], here.parent)))
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert json.loads((out.with_suffix(".run") / "status.json").read_text())["epoch"] == 1

    resumed = Trained(encoder(studies, out), out, [])
    assert same(resumed.detector.encoder, quick1.detector.encoder)
    assert timeless(resumed.rows) == timeless(quick1.rows)
    record = resumed.detector.card.encoder
    assert record.seconds > sum(row["seconds"] for row in resumed.rows)


def test_an_epoch_that_was_kept_but_not_shown_is_shown_when_the_run_goes_on(studies, quick1, tmp_path, monkeypatch):
    out = tmp_path / "encoder.safetensors"
    draw = training_run.draw_curves

    def full_disk(history, best_epoch, title):
        if len(history) == 2:
            raise OSError("No space left on device")
        return draw(history, best_epoch, title)

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "draw_curves", full_disk)
        with pytest.raises(OSError, match="No space left"):
            encoder(studies, out)
    resumed = Trained(encoder(studies, out), out, [])
    assert timeless(resumed.rows) == timeless(quick1.rows)
    assert same(resumed.detector.encoder, quick1.detector.encoder)
    events = EventAccumulator(str(resumed.run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2]


def test_a_checkpoint_loads_without_running_code_and_nothing_half_written_stays(stage1):
    saved = torch.load(stage1.run / "checkpoint.pt", weights_only=True)
    assert len(saved["history"]) == 8
    assert {path.name for path in stage1.run.iterdir() if path.name.startswith(".")} <= {".lock"}


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    (tmp_path / "slabs").mkdir()
    leftovers = [tmp_path / f".{'0a' * 16}.checkpoint.pt", tmp_path / "slabs" / f".{'f3' * 16}.x.npy"]
    for path in leftovers:
        path.write_bytes(b"half")
    with TrainingRun(tmp_path, "train encoder", 1, silent):
        assert not any(path.exists() for path in leftovers)


def test_a_finished_training_returns_its_result_at_once(studies, stage1):
    before = stage1.out.read_bytes()
    reports: list[Progress] = []
    again = encoder(studies, stage1.out, LEARNING, reports.append, synthetic=True)
    assert not any(report.task in ("train encoder", "prepare slabs") for report in reports)
    assert stage1.out.read_bytes() == before
    assert same(again.encoder, stage1.detector.encoder)
    assert json.loads((stage1.run / "status.json").read_text())["state"] == "finished"


def test_a_finished_training_publishes_again_what_was_deleted(studies, quick1):
    quick1.out.unlink()
    again = encoder(studies, quick1.out)
    assert same(again.encoder, quick1.detector.encoder)
    assert Detector.load(quick1.out).card == quick1.detector.card


def test_the_run_folder_of_other_settings_is_refused(studies, quick1):
    with pytest.raises(InputError, match=r"another training \(batch: 16 instead of 8\): choose another run folder"):
        encoder(studies, quick1.out, replace(QUICK, batch=8))
    with pytest.raises(InputError, match=r"another training \(slabs: .*choose another run folder"):
        encoder(studies, quick1.out, slabs=replace(SLABS, hu_window=(-500, 500)))


def test_the_run_folder_of_other_studies_is_refused(studies, quick1, tmp_path):
    volume = read_volume(studies[0].path)
    more = SparseAnnotation.read(studies[0].annotation).review(ReviewedSlice(0, float(volume.slice_z_mm[0]), "none"))
    more.write(tmp_path / "more.json", volume)
    changed = (replace(studies[0], annotation=tmp_path / "more.json"), *studies[1:])
    for other in (changed, studies[:-1]):
        with pytest.raises(InputError, match=r"\(studies: changed since\): choose another run folder"):
            encoder(other, quick1.out)


def test_the_run_folder_of_the_other_stage_is_refused(studies, stage1, quick1, tmp_path):
    with pytest.raises(InputError, match="choose another run folder"):
        train_classifier(studies, stage1.out, tmp_path / "model.safetensors", run_dir=quick1.run)


def test_a_broken_checkpoint_is_refused(studies, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"checkpoint.pt is damaged or of another program: choose another run folder"):
        encoder(studies, tmp_path / "encoder.safetensors", run_dir=run)


def test_two_trainings_in_one_folder_are_refused(studies, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with (
        filelock.FileLock(run / ".lock"),
        pytest.raises(InputError, match="another training is running in it"),
    ):
        encoder(studies, tmp_path / "encoder.safetensors", run_dir=run)


def test_the_seed_decides_everything_and_the_workers_nothing(studies, quick1, tmp_path):
    again = encoder(studies, tmp_path / "a.safetensors", replace(QUICK, workers=1))
    other = encoder(studies, tmp_path / "b.safetensors", replace(QUICK, seed=1, epochs=1))
    assert same(again.encoder, quick1.detector.encoder)
    assert not same(again.encoder, other.encoder)


# Splits and too little data


def test_both_stages_hold_out_the_same_patients(studies):
    paired = [replace(study, patient=f"patient{number // 4}") for number, study in enumerate(studies)]
    extra = [Study(f"extra{n}", Path(f"{n}.nrrd"), f"patient{n}", "positive") for n in range(3)]
    listed = [*paired, *extra]
    sides = {study.study: study.split for study in split(listed, EncoderTraining())}
    assert sides == {study.study: study.split for study in split(listed, ClassifierTraining())}
    for patient in {study.patient for study in listed}:
        assert len({sides[study.study] for study in listed if study.patient == patient}) == 1
    assert set(sides.values()) == {"train", "validation"}


def test_a_test_study_is_not_touched(studies, tmp_path):
    held_out = replace(studies[0], split="test", path=tmp_path / "not even there.nrrd")
    detector = encoder((held_out, *studies[1:]), tmp_path / "encoder.safetensors", replace(QUICK, epochs=1))
    assert read_volume(studies[0].path).sha256 not in detector.card.encoder.image_sha256


def test_without_annotations_stage_one_says_so(studies, tmp_path):
    with pytest.raises(InputError, match=r"train studies: no annotated embolism slice in \d studies"):
        encoder(studies[1::2], tmp_path / "encoder.safetensors")


def test_an_empty_validation_is_refused_before_training(studies, tmp_path):
    everything = tuple(replace(study, split="train") for study in studies)
    with pytest.raises(InputError, match="validation studies: no annotated embolism slice in 0 studies"):
        encoder(everything, tmp_path / "encoder.safetensors")
    assert not (tmp_path / "encoder.run" / "checkpoint.pt").exists()


def test_labels_of_one_class_are_refused(studies, stage1, tmp_path):
    with pytest.raises(InputError, match=r"train studies: none of \d has the label 'negative'"):
        train_classifier(studies[::2], stage1.out, tmp_path / "model.safetensors")


def test_a_bad_study_is_named_before_training_starts(studies, tmp_path):
    broken = tmp_path / "broken.nrrd"
    broken.write_bytes(b"NRRD0004\nnonsense")
    with pytest.raises(InputError, match="study study3: "):
        encoder((*studies[:3], replace(studies[3], path=broken), *studies[4:]), tmp_path / "encoder.safetensors")
    status = json.loads((tmp_path / "encoder.run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "study study3" in status["text"]


def test_one_ct_on_both_sides_is_refused(studies, tmp_path):
    sides = [replace(study, split="validation" if number < 2 else "train") for number, study in enumerate(studies)]
    copy = tmp_path / "copy.nrrd"
    copy.write_bytes(studies[0].path.read_bytes())
    twice = replace(sides[0], study="twin", path=copy, patient="other", split="train")
    with pytest.raises(InputError, match="study study0 in validation is the same CT as study twin in train"):
        encoder([*sides, twice], tmp_path / "encoder.safetensors")


def test_an_untrained_encoder_is_refused(studies, tmp_path):
    Detector.untrained(0, SLABS, ENCODER, CLASSIFIER).save(tmp_path / "untrained.safetensors")
    with pytest.raises(InputError, match="its encoder is not trained: train stage I first"):
        train_classifier(studies, tmp_path / "untrained.safetensors", tmp_path / "model.safetensors")


def test_a_training_that_diverges_says_so(studies, tmp_path):
    with pytest.raises(InputError, match=r"the loss in epoch \d+ is (nan|inf): train anew with a lower learning rate"):
        encoder(studies, tmp_path / "encoder.safetensors", replace(QUICK, learning_rate=1e20))


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"epochs": 0}, {"learning_rate": math.nan}, {"validation_fraction": 1.0}, {"precision": "float16"}],
)
def test_settings_out_of_range_are_refused(wrong):
    for settings in (EncoderTraining, ClassifierTraining):
        with pytest.raises(InputError, match=next(iter(wrong))):
            settings(**wrong)


def test_the_defaults_are_the_papers():
    stage1, stage2 = EncoderTraining(), ClassifierTraining()
    assert (stage1.learning_rate, stage1.batch, stage1.epochs, stage1.validation_fraction) == (1e-4, 48, 100, 0.2)
    assert (stage2.learning_rate, stage2.batch, stage2.epochs, stage2.validation_fraction) == (1e-4, 32, 50, 0.2)
    assert (stage1.attention_weight, stage1.augment) == (1.0, False)


def test_fresh_statistics_are_the_means_over_the_training_side():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)
            self.seen = torch.nn.Linear(1, 1)

        def forward(self, x):
            return self.seen(self.norm(x))[:, 0]

    values = torch.arange(12.0)[:, None] + 100
    side = [StudyItem(value, torch.tensor(0)) for value in values]
    network = Net()
    settings = ClassifierTraining(batch=4, fresh_statistics=True)
    _estimate_statistics(_Scorer(network, lambda items, _: {"logit": network(items.features)}), side, settings)
    assert network.norm.running_mean.item() == pytest.approx(values.mean().item())
    assert network.norm.momentum == 0.1
    assert not network.norm.training or not network.training
