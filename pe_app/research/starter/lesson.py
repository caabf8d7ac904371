"""Stage I of the starter: every cell of many windows is asked whether it shows a clot.

Resumes where it was interrupted; weights, their running mean, optimiser and sources of chance are written together.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pe_app.common.device import autocast
from pe_app.common.files import replacing
from pe_app.model.slab_encoder import EncoderConfig, SlabEncoder
from pe_app.model.winograd import choose
from pe_app.research.starter.windows import Batch, Patient, WindowSettings, WindowSource

log = logging.getLogger(__name__)

Ahead = tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.int64], int]
"""Slabs, targets and groups of a batch, and how many patients there are."""

RESCAN = 200
"""Batches after which the reader looks for patients that were made meanwhile."""

KEPT_BATCHES = 48
"""Last batches, seen again when the reader lags behind."""

SIZES_ML = {"small": (0.0, 0.3), "medium": (0.3, 3.0), "large": (3.0, math.inf)}


@dataclass(frozen=True)
class LessonSettings:
    """How stage I learns cells.

    Attributes:
        steps: batches in all; the learning rate falls along a cosine from step to step.
        learning_rate: of AdamW, after ``warm_up`` steps.
        warm_up: steps in which it rises.
        weight_decay: of AdamW.
        rare: weight of a cell with a clot.
        slab_weight: weight of the window's own label, asked of its strongest cells.
        strongest: how many of them.
        mean_decay: of the running mean of the weights.
        clip: largest norm of the gradient.
        every: steps between checkpoints with validation.
        seed: of everything random.
        windows: how windows are made.
    """

    steps: int = 8000
    learning_rate: float = 6e-4
    warm_up: int = 100
    weight_decay: float = 0.01
    rare: float = 5.0
    slab_weight: float = 0.5
    strongest: int = 3
    mean_decay: float = 0.998
    clip: float = 5.0
    every: int = 250
    seed: int = 1
    windows: WindowSettings = field(default_factory=WindowSettings)


def cell_logits(encoder: SlabEncoder, slabs: Tensor) -> Tensor:
    """``(batch, rows, columns)``: the head of the decision, asked of every cell instead of their mean."""
    with autocast(slabs.device, "auto"):
        features = encoder(slabs.contiguous(memory_format=torch.channels_last)).features
    return encoder.cell_logits(features.float())


def lesson_loss(logits: Tensor, target: Tensor, settings: LessonSettings) -> Tensor:
    """Binary cross-entropy of the cells asked, and of windows by their strongest cells where their label is known."""
    weight = torch.where(target == 1, settings.rare, torch.where(target == 0, 1.0, 0.0))
    cells = F.binary_cross_entropy_with_logits(logits, target.clamp(min=0), weight, reduction="sum") / weight.sum()
    strongest = logits.flatten(1).topk(settings.strongest, 1).values.mean(1)
    positive = (target == 1).flatten(1).any(1)
    known = (positive | (target == 0).flatten(1).all(1)).float()
    slabs = F.binary_cross_entropy_with_logits(strongest, positive.float(), known, reduction="sum")
    return cells + settings.slab_weight * slabs / known.sum().clamp(min=1)


def learn(
    folder: Path,
    training: Sequence[Path],
    held_out: Sequence[str],
    start: Mapping[str, Tensor],
    settings: LessonSettings,
    pools: Mapping[str, Sequence[Batch]],
    until: float = math.inf,
) -> None:
    """Train, or go on training, in a folder.

    Args:
        folder: gets ``checkpoint.pt``, ``mean.pt`` (the running mean of the weights) and ``log.jsonl``.
        training: folders with a folder of ingredients for each patient; new ones are found while it runs.
        held_out: names of patients that are left out.
        start: weights of the encoder to begin with.
        settings: how.
        pools: batches to validate on, by name.
        until: time (``time.time()``) at which it stops with a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    encoder = SlabEncoder(EncoderConfig())
    choose(encoder, by_points=False)  # direct convolutions in bfloat16 train two to three times faster
    encoder.load_state_dict(dict(start))
    encoder = encoder.to(memory_format=torch.channels_last)
    mean = copy.deepcopy(encoder).eval()
    optimiser = torch.optim.AdamW(
        encoder.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    step, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        encoder.load_state_dict(saved["encoder"])
        mean.load_state_dict(saved["mean"])
        optimiser.load_state_dict(saved["optimiser"])
        step = int(saved["step"])
    reader = _Reader(training, held_out, settings, settings.seed * 1000 + step)
    losses: list[float] = []
    begin, encoder = time.time(), encoder.train()
    while step < settings.steps:
        batch = reader.next()
        loss = lesson_loss(cell_logits(encoder, batch.slabs), batch.target, settings)
        for group in optimiser.param_groups:
            group["lr"] = _rate(step, settings)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(encoder.parameters(), settings.clip)
        optimiser.step()
        step += 1
        _follow(mean, encoder, min(settings.mean_decay, (1 + step) / (10 + step)))
        losses.append(loss.item())
        last = step == settings.steps or time.time() > until
        if step % settings.every == 0 or last:
            state = {"encoder": encoder.state_dict(), "mean": mean.state_dict(), "optimiser": optimiser.state_dict(),
                     "step": step}  # fmt: skip
            for path, content in ((checkpoint, state), (folder / "mean.pt", mean.state_dict())):
                with replacing(path) as temporary:
                    torch.save(content, temporary)
            figures = {name: scores(mean, pool) for name, pool in pools.items()}
            entry = {"step": step, "seconds": round(time.time() - begin), "loss": round(float(np.mean(losses)), 4),
                     "patients": reader.patients, "again": reader.again, **figures}  # fmt: skip
            losses.clear()
            with (folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
        if last:
            break
    reader.close()


@torch.no_grad()
def scores(encoder: SlabEncoder, pool: Sequence[Batch]) -> dict[str, float]:
    """How windows with a clot stand against their twins and against windows of others, by the strongest cell."""
    encoder.eval()
    with_clot, twins, others, hits, sizes = [], [], [], [], []
    for batch in pool:
        logits = cell_logits(encoder, batch.slabs)
        peak = logits.flatten(1).amax(1)
        place = logits.flatten(1).argmax(1)
        shown = (batch.target == 1).flatten(1)
        for row in range(0, 2 * batch.pairs, 2):
            if shown[row].any():
                with_clot.append(float(peak[row]))
                twins.append(float(peak[row + 1]))
                hits.append(bool(batch.target[row].flatten()[place[row]] != 0))
                sizes.append(float(batch.clot_ml[row]))
        rest = torch.arange(len(peak)) >= 2 * batch.pairs
        clear = (batch.target == 0).flatten(1).all(1)
        others += peak[rest & clear].tolist()
    figures = {"windows": len(with_clot), "twin": _auc(with_clot, twins), "any": _auc(with_clot, others + twins),
               "pointing": float(np.mean(hits))}  # fmt: skip
    for name, (low, high) in SIZES_ML.items():
        rows = [k for k, ml in enumerate(sizes) if low <= ml < high]
        figures[f"{name}"] = _auc([with_clot[k] for k in rows], [twins[k] for k in rows])
        figures[f"{name}_any"] = _auc([with_clot[k] for k in rows], others + twins)
    return {name: round(value, 3) for name, value in figures.items()}


def _auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    if not positive or not negative:
        return math.nan
    ordered, values = np.sort(negative), np.array(positive)
    below = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return float(below.mean() / 2 / len(ordered))


def _rate(step: int, settings: LessonSettings) -> float:
    rising = min(1.0, (step + 1) / settings.warm_up)
    return settings.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * step / settings.steps)) + 1e-6


@torch.no_grad()
def _follow(mean: SlabEncoder, encoder: SlabEncoder, decay: float) -> None:
    for kept, new in zip(mean.state_dict().values(), encoder.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)


class _Reader:
    """Batches made ahead by another process; earlier ones again, mirrored, where it lags behind."""

    def __init__(self, folders: Sequence[Path], held_out: Sequence[str], settings: LessonSettings, seed: int) -> None:
        context = mp.get_context("spawn")
        self.queue: Queue[Ahead] = context.Queue(8)
        arguments = (self.queue, list(folders), list(held_out), settings.windows, seed)
        self.process = context.Process(target=_read_ahead, args=arguments, daemon=True)
        self.process.start()
        self.kept: list[Batch] = []
        self.rng = np.random.default_rng(seed)
        self.patients, self.again = 0, 0

    def next(self) -> Batch:
        """The next batch."""
        try:
            made = self.queue.get(block=len(self.kept) < KEPT_BATCHES // 2, timeout=600)
        except queue.Empty:
            self.again += 1
            batch = self.kept[int(self.rng.integers(len(self.kept)))]
            slabs = batch.slabs.flip(-1) + float(self.rng.normal(0, 0.008))
            return Batch(slabs.clamp(0, 1), batch.target.flip(-1), batch.clot_ml, batch.groups, batch.pairs)
        slabs, target, groups = (torch.from_numpy(array) for array in made[:3])
        self.patients = made[3]
        batch = Batch(slabs.float(), target, torch.zeros(len(target)), groups, 0)
        self.kept = [*self.kept[-KEPT_BATCHES + 1 :], batch]
        return batch

    def close(self) -> None:
        """End the process."""
        self.process.terminate()


def _read_ahead(
    out: Queue[Ahead], folders: list[Path], held_out: list[str], windows: WindowSettings, seed: int
) -> None:
    os.nice(4)
    torch.set_num_threads(1)
    made, paths = 0, find_patients(folders, held_out)
    source = WindowSource([Patient(path) for path in paths], seed, windows)
    while True:
        if made and made % RESCAN == 0 and (now := find_patients(folders, held_out)) != paths:
            paths, source = now, WindowSource([Patient(path) for path in now], seed + made, windows)
        batch = source.batch()
        out.put((batch.slabs.half().numpy(), batch.target.numpy(), batch.groups.numpy(), len(paths)))
        made += 1


def find_patients(folders: Sequence[Path], held_out: Sequence[str]) -> list[Path]:
    """Folders of complete ingredients, without those held out."""
    return sorted(path.parent for folder in folders for path in folder.glob("*/places.npz")
                  if path.parent.name not in held_out)  # fmt: skip


def flat_settings(settings: LessonSettings) -> dict[str, str | int | float | bool | None]:
    """The settings by name, for the record of the training."""
    flat: dict[str, str | int | float | bool | None] = {}
    for name, value in {**asdict(settings), **asdict(settings.windows)}.items():
        if not isinstance(value, dict):
            flat[name] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat
