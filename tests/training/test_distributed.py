"""Several processes that train one model: the same as one process alone, on two processes of this machine with gloo."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from small_studies import CLASSIFIER, ENCODER, SLABS, small_studies
from torch import nn
from typer.testing import CliRunner

from pe_app.cli import app
from pe_app.common import distributed
from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled, Progress
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume_io import read_volume
from pe_app.model.detector import Detector
from pe_app.studies import write_studies
from pe_app.training.datasets import Augmentation, SlabItem, StudyItem, augmented, encode_studies
from pe_app.training.fine_tuning import train_end_to_end
from pe_app.training.loop import _Batch, _Scorer, _train_step
from pe_app.training.stages import ClassifierTraining, EncoderTraining, score_slabs, train_classifier, train_encoder

HERE = Path(__file__).parents[1]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What processes do together


def _member(rank: int, size: int, folder: str, work: Callable[[], object]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.save(work(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def together(work: Callable[[], object], folder: Path, size: int = 2) -> list:
    """What ``work`` gives in each of some processes."""
    torch.multiprocessing.start_processes(_member, (size, str(folder), work), nprocs=size, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


class Small(nn.Module):
    """What depends on the batch: normalisation in two and three dimensions, dropout of units and channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.volumes = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4, momentum=0.3))
        self.out = nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x) * F.dropout(x.new_ones(len(x), 3, 1, 1), 0.3, self.training)
        x = self.volumes(x[:, :, None]).mean((2, 3, 4))
        return self.out(self.dropout(x))[:, 0]


def learn(total: int) -> dict[str, torch.Tensor]:
    """Three steps on batches of 5, 4 and ``total`` items, and a last one without learning."""
    torch.manual_seed(0)
    network = Small().double()
    batches = [100 + 50 * torch.rand(count, 3, 4, 4).double() for count in (5, 4, total)]
    names = list(network.state_dict())
    with distributed.synchronised_batch_norm(network):
        assert list(network.state_dict()) == names
        learner = network
        if distributed.world_size() > 1:
            learner = nn.parallel.DistributedDataParallel(network)
        optimiser = torch.optim.SGD(network.parameters(), 0.1)
        torch.manual_seed(1)
        for batch in batches:
            own = distributed.shard_slice(len(batch))
            optimiser.zero_grad()
            with distributed.GlobalBatchDropout(own, len(batch)):
                losses = learner(batch[own]).square()
            (losses.sum() * distributed.world_size() / len(batch)).backward()
            optimiser.step()
    kinds = {type(module) for module in network.modules()}
    assert distributed.SyncBatchNormOnCpu not in kinds
    assert network.norm.training
    seen = network.eval()(batches[0])
    return {**network.state_dict(), "seen": seen}


@pytest.mark.parametrize("total", [1, 4])
def test_gradients_statistics_and_dropout_of_parts_are_those_of_whole_batches(tmp_path, total):
    alone = learn(total)
    for found in together(lambda: learn(total), tmp_path):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, msg=name)


def learn_stage(stage: str) -> dict[str, torch.Tensor]:
    """Some steps of the loop in double precision, where nothing hides behind rounding."""
    detector = Detector.untrained(0, SLABS, ENCODER, CLASSIFIER)
    network = getattr(detector, stage).double()
    generator = torch.Generator().manual_seed(0)
    judge = _Scorer(
        network,
        lambda items, _: (
            score_slabs(network, items, EncoderTraining(precision="float32"))
            if stage == "encoder"
            else {"loss": F.binary_cross_entropy_with_logits(network(items.features), items.label, reduction="none")}
        ),
    )
    losses = []
    with distributed.synchronised_batch_norm(network):
        learner = nn.parallel.DistributedDataParallel(judge) if distributed.world_size() > 1 else judge
        optimiser = torch.optim.Adam(network.parameters(), 1e-3)
        torch.manual_seed(1)  # of dropout
        for total in (5, 4, 1):
            own = distributed.shard_slice(total)
            if stage == "encoder":
                slab = torch.rand(total, 5, 64, 64, generator=generator).double()
                label = torch.tensor([1, 0, 1, 0, 1])[:total]
                target = (torch.rand(total, 4, 4, generator=generator) > 0.7) * label[:, None, None].double()
                items = SlabItem(slab[own], target[own], label[own], label[own])
            else:
                features = torch.rand(total, 6, 64, 4, 4, generator=generator).double()
                items = StudyItem(features[own], torch.tensor([1.0, 0, 1, 0, 1])[:total][own].double())
            columns = _train_step(learner, optimiser, _Batch(items, own, total), generator)
            losses.append(distributed.gather_rows(columns["loss"])[0])
    return {**network.state_dict(), "losses": torch.cat(losses)}


@pytest.mark.parametrize("stage", ["encoder", "classifier"])
def test_parts_of_batches_teach_what_whole_ones_do(tmp_path, stage):
    alone = learn_stage(stage)
    for found in together(lambda: learn_stage(stage), tmp_path):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_slabs_are_changed_as_they_would_be_in_one_process(tmp_path):
    rng = np.random.default_rng(0)
    targets = torch.zeros(14, 6, 6)
    targets[torch.arange(0, 14, 2), torch.from_numpy(rng.integers(0, 6, 7)), 2] = 1
    slabs = torch.rand(14, 5, 96, 96)
    config = SlabConfig(matrix=128, crop=96, slab_count=6)

    def change() -> list[torch.Tensor]:
        settings = Augmentation(flip=True, shift_cells=2, jitter_hu=30, window_cells=3)
        generator = torch.Generator().manual_seed(4)
        own = [2 * bound for bound in (distributed.shard_slice(7).start, distributed.shard_slice(7).stop)]
        part = slice(*own)
        items = SlabItem(slabs[part], targets[part], torch.zeros(14)[part], torch.zeros(14)[part])
        return list(augmented(items, settings, config, generator, together=2)[:2])

    alone = change()
    parts = together(change, tmp_path, size=3)
    for column, whole in enumerate(alone):
        assert torch.equal(torch.cat([part[column] for part in parts]), whole)


def test_jobs_come_back_in_their_order_and_every_one_is_done_once(tmp_path):
    def work() -> tuple[list[int], list[int], str]:
        done: list[int] = []

        def square(job: int) -> int:
            done.append(job)
            return job * job

        return (
            distributed.map_sharded(square, range(7)),
            done,
            distributed.from_main(lambda: f"of {distributed.rank()}"),
        )

    found = together(work, tmp_path, size=3)
    assert [squares for squares, _, _ in found] == [[n * n for n in range(7)]] * 3
    assert sorted(job for _, done, _ in found for job in done) == list(range(7))
    assert {text for _, _, text in found} == {"of 0"}


def test_what_one_process_meets_all_raise_and_none_waits_for_ever(tmp_path):
    def work() -> list[str]:
        said = []
        for number, error in ((1, InputError("study x: broken")), (0, Cancelled("enough"))):
            try:
                with distributed.raised_together():
                    if distributed.rank() == number:
                        raise error
            except (InputError, Cancelled) as met:
                said.append(f"{type(met).__name__}: {met}")
        return said

    assert together(work, tmp_path) == [["InputError: study x: broken", "Cancelled: enough"]] * 2


def test_both_stages_at_once_are_for_one_process(tmp_path):
    def work() -> str:
        with pytest.raises(InputError, match="start it without torchrun") as met:
            train_end_to_end((), tmp_path / "model.safetensors", tmp_path / "out.safetensors")
        return str(met.value)

    assert len(together(work, tmp_path)) == 2


# The trainings, as a person starts them


def torchrun(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    paths = os.pathsep.join(map(str, (HERE.parent, HERE)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    studies = small_studies(folder, count=6, every=3)
    write_studies(studies, folder / "studies.csv")
    return studies


@pytest.fixture(scope="module")
def listed(studies) -> Path:
    return studies[0].path.parent / "studies.csv"


# of 12 training slabs: batches of 7 and of the others
ENCODER_TRAINING = EncoderTraining(
    epochs=2, batch=7, learning_rate=2e-5, precision="float32", fresh_statistics=True, augment=True,
    augmentation=Augmentation(flip=True, shift_cells=1, jitter_hu=20, window_cells=0),
)  # fmt: skip
CLASSIFIER_TRAINING = ClassifierTraining(epochs=3, batch=5, learning_rate=2e-5, precision="float32")
SHAPES = {"slabs": SLABS, "network": ENCODER, "classifier": CLASSIFIER}


class Alone(NamedTuple):
    folder: Path
    detector: Detector


@pytest.fixture(scope="module")
def alone(studies, tmp_path_factory) -> Alone:
    """Both stages trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    encoder, model = folder / "encoder.safetensors", folder / "model.safetensors"
    train_encoder(studies, encoder, settings=ENCODER_TRAINING, **SHAPES)
    return Alone(folder, train_classifier(studies, encoder, model, settings=CLASSIFIER_TRAINING))


def check_alike(found: nn.Module, expected: nn.Module, start: nn.Module) -> None:
    """Moved by the same, but for the order of sums; Adam goes by a gradient's sign, also where that is all rounding."""
    to, wanted, origin = (torch.cat([p.flatten() for p in net.parameters()]) for net in (found, expected, start))
    assert (to - wanted).norm() < 0.05 * (wanted - origin).norm()


def metrics(out: Path) -> list[dict[str, float]]:
    history = json.loads((out.with_suffix(".run") / "status.json").read_text())["history"]
    return [{name: value for name, value in row.items() if name not in ("seconds", "waiting")} for row in history]


def test_two_processes_train_the_encoder_that_one_would(studies, alone, tmp_path):
    out, slabs = tmp_path / "encoder.safetensors", alone.folder / "encoder.run" / "slabs"
    told: list[Progress] = []

    def train() -> tuple[dict[str, torch.Tensor], int]:
        settings = {"settings": ENCODER_TRAINING, "slabs_dir": slabs, "progress": told.append}
        return train_encoder(studies, out, **settings, **SHAPES).encoder.state_dict(), len(told)

    (first, reports), (second, silence) = together(train, tmp_path)
    assert reports > 0
    assert silence == 0
    assert all(torch.equal(first[name], second[name]) for name in first)
    one = metrics(alone.folder / "encoder.safetensors")
    assert [pytest.approx(row, rel=1e-3, abs=1e-3, nan_ok=True) for row in one] == metrics(out)
    start = Detector.untrained(0, SLABS, ENCODER, CLASSIFIER)
    check_alike(Detector.load(out).encoder, alone.detector.encoder, start.encoder)
    assert all(torch.equal(first[name], value) for name, value in Detector.load(out).encoder.state_dict().items())


KILLED = """
import os, signal
from pe_app.training import stages as training
from pe_app.cli import main

judged, judge = [], training.score_studies
def score(*arguments):
    judged.append(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(judged) == 5:
        os.kill(os.getpid(), signal.SIGKILL)  # in the second epoch
    return judge(*arguments)
training.score_studies = score
main()
"""


def test_after_a_process_was_killed_training_goes_on_and_ends_as_if_nothing_had_happened(listed, alone, tmp_path):
    script, out = tmp_path / "killed.py", tmp_path / "model.safetensors"
    script.write_text(KILLED)
    words = ("--epochs", 3, "--batch", 5, "--learning-rate", 2e-5, "--precision", "float32", "--seed", 0)
    encoder = alone.folder / "encoder.safetensors"
    files = ("--studies", listed, "--encoder", encoder, "--out", out)
    done = torchrun("--max-restarts", 1, script, "train", "classifier", *files, *words)
    assert done.returncode == 0, done.stderr
    assert "exitcode  : -9" in done.stderr or "exitcode: -9" in done.stderr
    assert [done.stderr.count(f"train classifier: epoch {epoch} of 3") for epoch in (1, 2, 3)] == [1, 1, 1]
    one = metrics(alone.folder / "model.safetensors")
    assert [pytest.approx(row, rel=1e-3, abs=1e-3, nan_ok=True) for row in one] == metrics(out)
    start = Detector.untrained(0, SLABS, ENCODER, CLASSIFIER)
    check_alike(Detector.load(out).classifier, alone.detector.classifier, start.classifier)


# The feature cache

KILLED_ENCODER = """
import os, signal
from pe_app.cli import main
from pe_app.model.detector import Detector

encoded, encode = [], Detector.encode
def encode_or_die(*arguments):
    encoded.append(1)
    if os.environ["RANK"] == "1" and len(encoded) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)
Detector.encode = encode_or_die
main()
"""


def test_a_killed_process_costs_at_most_the_study_in_hand(listed, studies, alone, tmp_path):
    script, cache = tmp_path / "killed.py", tmp_path / "cache"
    script.write_text(KILLED_ENCODER)
    model = alone.folder / "encoder.safetensors"
    words = ("encode", "--studies", str(listed), "--model", str(model), "--cache", str(cache))
    done = torchrun(script, *words)
    assert done.returncode != 0
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*.npy")}
    ranks_own = {read_volume(study.path).sha256 for study in studies[1::2][:2]}
    assert ranks_own <= {path.name.partition("-")[0] for path in kept}

    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    assert f"6 of 6 studies are in {cache}, {6 - len(kept)} of them new" in again.output
    files = encode_studies(Detector.load(model), studies, tmp_path / "other")
    for path in files:
        assert np.array_equal(np.load(cache / path.name), np.load(path))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
