"""The loop that both trainings share: passes over training and validation, each epoch kept by the run when it ends.

Everything random in an epoch comes from the seed and the epoch's number, so nothing random has to be kept in between.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pe_app.datasets import SlabItem, StudyItem
from pe_app.errors import InputError
from pe_app.progress import Progress
from pe_app.training_run import Metrics, TrainingRun

logger = logging.getLogger(__name__)

Columns = dict[str, Tensor]
"""What is known of every item of a batch or pass, ``(items,)`` each: losses, logit, label, ..."""

Schedule = Literal["constant", "cosine"]
"""How the learning rate goes from epoch to epoch."""

Item = TypeVar("Item", SlabItem, StudyItem)


class LoopSettings(Protocol):
    """What the loop needs of a training's settings."""

    @property
    def batch(self) -> int:
        """Items a step."""

    @property
    def epochs(self) -> int:
        """Passes over the training side."""

    @property
    def learning_rate(self) -> float:
        """Of the first epoch."""

    @property
    def schedule(self) -> Schedule:
        """Of the learning rate."""

    @property
    def fresh_statistics(self) -> bool:
        """Whether batch normalisation's running statistics are estimated anew before validation."""

    @property
    def workers(self) -> int:
        """Processes that read items ahead."""

    @property
    def seed(self) -> int:
        """Of order, augmentation and dropout."""


def fit(
    run: TrainingRun,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    sides: tuple[Dataset[Item], Dataset[Item]],
    score: Callable[[Item, torch.Generator | None], Columns],
    settings: LoopSettings,
) -> None:
    """Train the epochs that are not done yet, and keep each when it ends.

    Args:
        run: the training; says where to go on, keeps the epochs, tells the progress.
        network: what is trained; on its device.
        optimiser: of its parameters.
        sides: training and validation.
        score: judges a batch: ``loss``, ``logit``, ``label`` and whatever else of every item is to be averaged; gets a
            generator for random changes while training, None while validating.
        settings: of the training.

    Raises:
        InputError: if the loss is not finite any more.
    """
    device = next(network.parameters()).device
    steps = [math.ceil(len(side) / settings.batch) for side in sides]  # type: ignore[arg-type]
    total = settings.epochs * sum(steps)
    for epoch in range(len(run.state.history) + 1, settings.epochs + 1):
        begin = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, epoch)
        done = (epoch - 1) * sum(steps)
        columns: list[Columns] = []
        generator = torch.Generator().manual_seed(derived_seed(settings.seed, "epoch", epoch))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derived_seed(settings.seed, "dropout", epoch))  # dropout knows no generator of its own
            for side, training in zip(sides, (True, False), strict=True):
                if settings.fresh_statistics and not training:
                    _estimate_statistics(network, sides[0], score, settings)
                scored = []
                for items in _batches(side, settings, device, generator if training else None):
                    column = _step(network, optimiser, score, items, generator if training else None)
                    scored.append(column)
                    done += 1
                    loss = float(column["loss"].mean())
                    if not math.isfinite(loss):
                        raise InputError(f"the loss in epoch {epoch} is {loss}: train anew with a lower learning rate")
                    run.report(Progress(run.task, done, total, f"epoch {epoch} of {settings.epochs}, loss {loss:.3f}"))
                columns.append({name: torch.cat([part[name] for part in scored]) for name in scored[0]})
        metrics = {"epoch": epoch, **_summary(columns[0], ""), **_summary(columns[1], "validation_")}
        run.finish_epoch(network, optimiser, {**metrics, "seconds": time.perf_counter() - begin})
        figures = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "epoch")
        logger.info("%s: epoch %d of %d: %s", run.task, epoch, settings.epochs, figures)


def learning_rate(settings: LoopSettings, epoch: int) -> float:
    """Of an epoch, from 1 on: the same in all, or falling along half a cosine that would reach 0 after the last."""
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * (1 + math.cos(math.pi * (epoch - 1) / settings.epochs)) / 2


def derived_seed(seed: int, *words: object) -> int:
    """A seed for one purpose, as good as independent of those for others."""
    return int.from_bytes(hashlib.sha256(repr((seed, *words)).encode()).digest()[:7], "big")


def _batches(
    side: Dataset[Item],
    settings: LoopSettings,
    device: torch.device,
    shuffle: torch.Generator | None,
) -> DataLoader[Item]:
    """The batches of one pass, in random order where a generator is given."""
    count = len(side)  # type: ignore[arg-type]
    order = range(count) if shuffle is None else torch.randperm(count, generator=shuffle).tolist()
    return DataLoader(
        side,
        settings.batch,
        sampler=order,
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own, or the loader would draw from the global one
    )


def _step(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    score: Callable[[Item, torch.Generator | None], Columns],
    items: Item,
    generator: torch.Generator | None,
) -> Columns:
    """Learn from a batch, or without a generator only judge it."""
    network.train(generator is not None)
    with torch.set_grad_enabled(generator is not None):
        columns = score(items, generator)
    if generator is not None:
        optimiser.zero_grad(set_to_none=True)
        columns["loss"].mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return {name: column.detach().cpu() for name, column in columns.items()}


def _estimate_statistics(
    network: nn.Module,
    side: Dataset[Item],
    score: Callable[[Item, torch.Generator | None], Columns],
    settings: LoopSettings,
) -> None:
    """Running means and variances of all batch normalisations as plain averages over one pass in random order."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    device = next(network.parameters()).device
    order = torch.Generator().manual_seed(derived_seed(settings.seed, "statistics"))
    with torch.no_grad():
        for items in _batches(side, settings, device, order):
            score(items, None)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _summary(columns: Columns, prefix: str) -> Metrics:
    """Means over one pass, the share decided rightly, and the AUC (not a number while one class is missing)."""
    logit, label = columns["logit"].double(), columns["label"]
    metrics = {
        name: float(column.double().nanmean()) for name, column in columns.items() if name not in ("logit", "label")
    }
    metrics["accuracy"] = float(((logit > 0) == (label > 0)).double().mean())
    both = 0 < int(label.sum()) < len(label)
    if both:
        from sklearn.metrics import roc_auc_score  # a second to import, and the first steps do without

    metrics["auc"] = float(roc_auc_score(label.numpy(), logit.numpy())) if both else math.nan
    return {prefix + name: value for name, value in metrics.items()}
