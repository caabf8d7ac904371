"""What a clot looks like, cell by cell: the encoder's first lesson, from chests with many painted clots.

A label says of a slab that somewhere in it there is a clot of a few pixels; that is little to learn from. Painted
clots are known in every pixel, so here every cell of the feature map is asked whether there is one in it. The weights
of the head that answers are those of stage I's decision, so that its Grad-CAM learns the same; the paper's loss takes
over afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from pe_app.common.device import Precision, autocast, best_device
from pe_app.common.files import replacing
from pe_app.common.progress import ProgressCallback
from pe_app.ct.slabs import ENCODER_STRIDE, SlabConfig, mask_crop, slab_at
from pe_app.ct.volume import Volume
from pe_app.model.detector import Detector, ModelCard
from pe_app.model.slab_encoder import SlabEncoder
from pe_app.phantom import paint_emboli
from pe_app.training.datasets import SlabItem
from pe_app.training.loop import Columns, Schedule, fit
from pe_app.training.run import TrainingRun

CLOTS = 30
"""Painted into one chest, as far as there is room: many more than a patient has, so that many cells are asked."""

SLABS = 40
"""At most, of one chest."""

SPACINGS_MM = (1.1, 2.6)
"""Between the slices of a slab: stage I sees 2.5 mm, stage II the lung resized to 200 slices."""

LEAST_PIXELS, NO_PIXELS = 12, 0
"""A cell shows a clot from so many of its 256 pixels on (about 7 mm2), and none at 0; between, it is not asked."""

RARE = 6.0
"""Weight of a cell with a clot."""


@dataclass(frozen=True)
class CellTraining:
    """How the first lesson is learned.

    Attributes:
        learning_rate: of Adam.
        batch: windows a step.
        epochs: passes over all slabs, one window of each.
        window_cells: side of a window, in cells of 16 pixels.
        schedule: of the learning rate.
        fresh_statistics: as in ``EncoderTraining``.
        precision: number format of the network.
        workers: processes that read ahead.
        seed: of everything random.
    """

    learning_rate: float = 1e-3
    batch: int = 16
    epochs: int = 10
    window_cells: int = 10
    schedule: Schedule = "cosine"
    fresh_statistics: bool = False
    precision: Precision = "auto"
    workers: int = 0
    seed: int = 1


def write_painted_slabs(volume: Volume, arteries: Volume, rng: np.random.Generator, out: Path) -> None:
    """Slabs of a chest with many clots painted into its arteries, and how many clot pixels every cell has.

    A structured array of ``slab`` (5, 384, 384) float16 and ``pixels`` (24, 24) uint16, evenly over the arteries.
    """
    config = SlabConfig()
    painted = paint_emboli(volume, arteries, rng, count=CLOTS)
    height = np.flatnonzero(painted.emboli_mask.voxels.any((1, 2)))
    slices = np.unique(np.linspace(height[0], height[-1], SLABS).round().astype(int)) if len(height) else []
    kind = [("slab", np.float16, (config.slices_per_slab, config.crop, config.crop)),
            ("pixels", np.uint16, (config.grid, config.grid))]  # fmt: skip
    records = np.zeros(len(slices), kind)
    for record, index in zip(records, slices, strict=True):
        apart = replace(config, spacing_mm=float(rng.uniform(*SPACINGS_MM)))
        record["slab"] = slab_at(painted.volume, int(index), apart)
        clot = mask_crop(painted.emboli_mask.voxels[index], config) >= 0.5
        record["pixels"] = clot.reshape(config.grid, ENCODER_STRIDE, config.grid, ENCODER_STRIDE).sum((1, 3))
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.save(file, records)


class PaintedSlabs(Dataset[SlabItem]):
    """All slabs of files that ``write_painted_slabs`` wrote; the target is the number of clot pixels of every cell."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.records = [np.load(path, mmap_mode="r") for path in files]
        self.places = [(file, row) for file, rows in enumerate(self.records) for row in range(len(rows))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> SlabItem:
        file, row = self.places[index]
        record = self.records[file][row]
        pixels = torch.from_numpy(record["pixels"].astype(np.float32))
        slab = torch.from_numpy(record["slab"].astype(np.float32))
        return SlabItem(slab, pixels, (pixels >= LEAST_PIXELS).any().long(), torch.tensor(file))


class CellJudge(nn.Module):
    """The encoder, and how its decision is scaled to a cell's.

    A cell's logit is ``gain * (w_embolism - w_none) f - threshold``: the direction of stage I's own head.
    """

    def __init__(self, encoder: SlabEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.log_gain = nn.Parameter(torch.zeros(()))
        self.threshold = nn.Parameter(torch.tensor(4.0))

    def forward(self, slabs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every cell ``(batch, rows, columns)``, and of every slab ``(batch, 2)``."""
        encoded = self.encoder(slabs)
        none, embolism = self.encoder.fc.weight
        score = (encoded.features.float() * (embolism - none)[:, None, None]).sum(1)
        return score * self.log_gain.exp() - self.threshold, encoded.logits


def train_cells(
    train: Sequence[Path], validation: Sequence[Path], out: Path, settings: CellTraining, progress: ProgressCallback
) -> None:
    """Teach an encoder from random weights what a clot looks like, and write it as a detector to train on.

    The same call goes on where a former one was interrupted.
    """
    device = best_device()
    start = Detector.untrained(settings.seed)
    judge = CellJudge(start.encoder).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(judge.parameters(), lr=settings.learning_rate)
    sides = PaintedSlabs(train), PaintedSlabs(validation)

    def score(items: SlabItem, generator: torch.Generator | None) -> Columns:
        windows = random_windows(items, settings.window_cells, generator or torch.Generator().manual_seed(1))
        if generator is not None:
            windows = changed_at_random(windows, generator)
        return score_cells(judge, windows, settings.precision)

    with TrainingRun(out.with_suffix(".run"), "train cells", settings.epochs, progress) as run:
        names = ",".join(path.name for path in (*train, *validation))
        run.resume({"settings": repr(settings), "slabs": names}, judge, optimiser)
        fit(run, judge, optimiser, sides, score, settings)
        judge.load_state_dict(dict(run.state.best_weights))
    card = ModelCard(out.stem, "0")
    Detector(judge.encoder.cpu(), start.classifier, start.slabs, card).save(out)


def score_cells(judge: CellJudge, items: SlabItem, precision: Precision) -> Columns:
    """Loss and figures of every window, with the graph for learning from ``loss``.

    ``loss`` is the mean binary cross-entropy of the cells asked plus the cross-entropy of the window's decision.
    """
    device = judge.threshold.device
    slabs = items.slab.to(device, memory_format=torch.channels_last)
    pixels, labels = items.target.to(device), items.label.to(device)
    with autocast(device, precision):
        cells, logits = judge(slabs)
    cells = cells.float()
    asked = ((pixels >= LEAST_PIXELS) | (pixels <= NO_PIXELS)).float()
    clot = (pixels >= LEAST_PIXELS).float()
    losses = F.binary_cross_entropy_with_logits(cells, clot, pos_weight=torch.tensor(RARE), reduction="none")
    cell_loss = (losses * asked).sum((1, 2)) / asked.sum((1, 2)).clamp(min=1)
    classification = F.cross_entropy(logits.float(), labels, reduction="none")
    place = cells.detach().flatten(1).argmax(1)
    hit = pixels.flatten(1).gather(1, place[:, None])[:, 0] > 0
    return {
        "loss": cell_loss + 0.1 * classification,
        "cell_loss": cell_loss,
        "classification_loss": classification,
        "pointing": torch.where(labels > 0, hit.float(), torch.full_like(cell_loss, math.nan)),
        "logit": cells.detach().flatten(1).amax(1),
        "label": labels,
    }


def random_windows(items: SlabItem, cells: int, generator: torch.Generator) -> SlabItem:
    """A square window of every slab: every other one holds a random clot cell, the others lie anywhere."""
    free = items.target.shape[-1] - cells
    slabs, targets = [], []
    for number, (slab, pixels) in enumerate(zip(items.slab, items.target, strict=True)):
        corner = torch.randint(0, free + 1, (2,), generator=generator)
        marked = (pixels >= LEAST_PIXELS).nonzero()
        if number % 2 == 0 and len(marked):
            chosen = marked[torch.randint(len(marked), (), generator=generator)]
            corner = (chosen - torch.randint(0, cells, (2,), generator=generator)).clamp(0, free)
        row, column = corner.tolist()
        targets.append(pixels[row : row + cells, column : column + cells])
        high, wide = (slice(at * ENCODER_STRIDE, (at + cells) * ENCODER_STRIDE) for at in (row, column))
        slabs.append(slab[:, high, wide])
    target = torch.stack(targets)
    label = (target >= LEAST_PIXELS).flatten(1).any(1).long()
    return items._replace(slab=torch.stack(slabs), target=target, label=label)


def changed_at_random(items: SlabItem, generator: torch.Generator) -> SlabItem:
    """Windows mirrored and turned, upside down along z, with other contrast of the blood, offset and sharpness.

    A clot looks the same from all sides, so these are more clots; a chest would not, but a window is no chest.
    """
    low, high = SlabConfig().hu_window
    slabs, targets = [], []
    for slab, target in zip(items.slab, items.target, strict=True):
        draw = torch.rand(8, generator=generator).tolist()
        turns = int(draw[0] * 4)
        slab, target = torch.rot90(slab, turns, (-2, -1)), torch.rot90(target, turns, (-2, -1))
        if draw[1] < 0.5:
            slab, target = slab.flip(-1), target.flip(-1)
        if draw[2] < 0.5:
            slab = slab.flip(0)
        hu = slab * (high - low) + low
        over = (hu - 130).clamp(min=0)
        hu = hu + over * (0.5 * draw[3] - 0.35)  # blood 35% less to 15% more above the clots
        if draw[4] < 0.3:
            soft = F.avg_pool2d(hu[None], 3, 1, 1, count_include_pad=False)[0]
            hu = hu + (soft - hu) * draw[5]
        noise = torch.randn(hu.shape, generator=generator) * (15 * draw[6] if draw[6] > 0.5 else 0)
        slab = ((hu + noise + 40 * (draw[7] - 0.5) - low) / (high - low)).clamp(0, 1)
        slabs.append(slab)
        targets.append(target)
    return items._replace(slab=torch.stack(slabs), target=torch.stack(targets))
