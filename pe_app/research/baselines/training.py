"""The 3D networks trained and asked like the method itself: same split, same loop, resumable in the same way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from pe_app.common.device import autocast, best_device
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume import Volume
from pe_app.research.baselines.cnn3d import CNN3D, CNN3DConfig, cnn3d_planes
from pe_app.research.baselines.penet import PENet, PENetConfig, penet_planes, window_starts
from pe_app.training.datasets import (
    AnnotatedSlabs,
    PreparedFile,
    StudyItem,
    StudySource,
    prepare_arrays,
)
from pe_app.training.loop import ItemMetrics, derived_seed, fit
from pe_app.training.run import TrainingRun
from pe_app.training.stages import (
    LABELS,
    SIDES,
    ClassifierTraining,
    check_labels,
    flat_settings,
    labelled_studies,
    score_studies,
    training_identity,
    training_record,
)

Network = TypeVar("Network", PENet, CNN3D)

AT_ONCE = 4
"""Windows or studies that pass a network together."""


class Windows(Dataset[StudyItem]):
    """A window of PENet round every slab of stage I: learnt from the same slices, told the same of them.

    The slice lies anywhere in the window, at a place that the seed draws once.
    """

    def __init__(self, slabs: AnnotatedSlabs, planes: Mapping[str, Path], config: PENetConfig, seed: int) -> None:
        self._length = config.slices
        known = np.flatnonzero(slabs.labels >= 0)  # where a candidate was rejected alone, nothing is known of the slice
        self._labels = slabs.labels[known]
        offsets = np.random.default_rng(seed).integers(0, config.slices, len(slabs))
        self._places = [
            (planes[slabs.files[slabs.places[number][0]].image_sha256], int(slabs.slices[number] - offsets[number]))
            for number in known.tolist()
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> StudyItem:
        path, wanted = self._places[index]
        planes = np.load(path, mmap_mode="r")
        start = min(max(wanted, 0), len(planes) - self._length)
        window = np.array(planes[start : start + self._length])
        return StudyItem(torch.from_numpy(window), torch.tensor(int(self._labels[index])))


def prepare_penet(
    sources: Sequence[StudySource], config: PENetConfig, cache_dir: Path, progress: ProgressCallback = silent
) -> tuple[PreparedFile, ...]:
    """The slices of every study as PENet reads them."""
    key = _key("penet", asdict(config))
    return prepare_arrays(
        sources, "prepare PENet", key, lambda volume: penet_planes(volume, config).astype(np.float16), cache_dir,
        progress,
    )  # fmt: skip


def prepare_cnn3d(
    sources: Sequence[StudySource], slabs: SlabConfig, cache_dir: Path, progress: ProgressCallback = silent
) -> tuple[PreparedFile, ...]:
    """What the 3D CNN reads of every study."""

    def make(volume: Volume) -> NDArray[np.float16]:
        return cnn3d_planes(volume, slabs).astype(np.float16)

    return prepare_arrays(sources, "prepare 3D CNN", _key("cnn3d", asdict(slabs)), make, cache_dir, progress)


def train_penet(
    sources: Sequence[StudySource],
    sides: tuple[AnnotatedSlabs, AnnotatedSlabs],
    run_dir: Path,
    settings: ClassifierTraining,
    config: PENetConfig,
    cache_dir: Path,
    progress: ProgressCallback = silent,
) -> PENet:
    """PENet after its best epoch, learnt from windows round the slabs of stage I.

    Studies without reviewed slices cannot teach it where an embolus is, so it does not learn from positive ones
    [ours]. The same call goes on where a former one was interrupted, and returns the result of one that had finished.

    Args:
        sources: the studies of both sides.
        sides: training and validation slabs (``prepare_slabs``).
        run_dir: as of both stages.
        settings: as of stage II; a batch is of windows.
        config: shape of the network and of its windows.
        cache_dir: prepared slices.
        progress: told after every step; may raise ``Cancelled``.
    """
    if settings.precision == "auto" and best_device().type == "cpu":
        # torch 2.14's bfloat16 weight gradient of a grouped 3D convolution is garbage (1e29) in some steps
        settings = replace(settings, precision="float32")
    network = _seeded(lambda: PENet(config), settings.seed)

    def prepare(report: ProgressCallback) -> tuple[Dataset[StudyItem], Dataset[StudyItem]]:
        files = prepare_penet(sources, config, cache_dir, report)
        planes = {file.image_sha256: file.path for file in files}
        train, validation = (
            Windows(slabs, planes, config, derived_seed(settings.seed, "windows", side))
            for slabs, side in zip(sides, SIDES, strict=True)
        )
        return train, validation

    return _trained("train PENet", network, asdict(config), sources, prepare, run_dir, settings, progress)


def train_cnn3d(
    sources: Sequence[StudySource],
    run_dir: Path,
    settings: ClassifierTraining,
    config: CNN3DConfig,
    slabs: SlabConfig,
    cache_dir: Path,
    progress: ProgressCallback = silent,
) -> CNN3D:
    """The 3D CNN after its best epoch, learnt from the labels of whole studies; otherwise as ``train_penet``."""
    network = _seeded(lambda: CNN3D(config), settings.seed)
    usable = [source for source in sources if source.study.label in LABELS]
    check_labels([source.study for source in usable])

    def prepare(report: ProgressCallback) -> tuple[Dataset[StudyItem], Dataset[StudyItem]]:
        files = prepare_cnn3d(usable, slabs, cache_dir, report)
        train, validation = (labelled_studies([s.study for s in usable], files, side) for side in SIDES)
        return train, validation

    shape = {**asdict(config), "slabs": asdict(slabs)}
    return _trained("train 3D CNN", network, shape, usable, prepare, run_dir, settings, progress)


def penet_probabilities(
    network: PENet, files: Sequence[PreparedFile], progress: ProgressCallback = silent
) -> NDArray[np.float64]:
    """A study's probability is that of its most suspicious window: ``(studies,)``."""
    config = network.config
    found = []
    for number, file in enumerate(files):
        progress(Progress("ask PENet", number, len(files), file.study))
        planes = np.load(file.path, mmap_mode="r")
        windows = np.stack([planes[start : start + config.slices] for start in window_starts(len(planes), config)])
        found.append(_probabilities(network, windows).max())
    return np.array(found)


def cnn3d_probabilities(
    network: CNN3D, files: Sequence[PreparedFile], progress: ProgressCallback = silent
) -> NDArray[np.float64]:
    """``(studies,)``."""
    found = []
    for number, file in enumerate(files):
        progress(Progress("ask the 3D CNN", number, len(files), file.study))
        found.append(_probabilities(network, np.load(file.path)[None])[0])
    return np.array(found)


@torch.inference_mode()
def _probabilities(network: nn.Module, inputs: NDArray[np.float16]) -> NDArray[np.float64]:
    device = next(network.parameters()).device
    network.eval()
    found = []
    for start in range(0, len(inputs), AT_ONCE):
        batch = torch.from_numpy(inputs[start : start + AT_ONCE]).to(device, torch.float32)
        with autocast(device):
            found.append(network(batch).float().sigmoid().cpu())
    return torch.cat(found).double().numpy()


def _seeded(make: Callable[[], Network], seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _trained(
    task: str,
    network: Network,
    shape: Mapping[str, object],
    sources: Sequence[StudySource],
    prepare: Callable[[ProgressCallback], tuple[Dataset[StudyItem], Dataset[StudyItem]]],
    run_dir: Path,
    settings: ClassifierTraining,
    progress: ProgressCallback,
) -> Network:
    device = best_device()
    network.to(device)
    with TrainingRun(run_dir, task, settings.epochs, progress) as run:
        optimiser = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
        run.resume(training_identity(settings, {"network": shape}, sources, {"task": task}), network, optimiser)
        if not run.state.published:

            def score(items: StudyItem, _: torch.Generator | None) -> ItemMetrics:
                return score_studies(network, items, settings)

            fit(run, network, optimiser, prepare(run.report), score, settings)
            used = flat_settings(asdict(settings))
            run.publish(training_record(run, used, sources, (), device, synthetic=False), network, optimiser)
        network.load_state_dict(dict(run.state.best_weights))
    return network


def _key(kind: str, shape: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps([kind, shape]).encode()).hexdigest()
