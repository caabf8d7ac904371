"""The loop that both trainings share: passes over training and validation, each epoch kept by the run when it ends.

Everything random in an epoch comes from the seed and the epoch's number, so nothing random has to be kept in between.
Where several processes train together (``distributed``), each takes its shard of every global batch; what is random is
drawn for the global batch and means are those of the global batch, so they learn what one process would learn.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from pe_app.common import distributed
from pe_app.common.errors import InputError
from pe_app.common.progress import Progress
from pe_app.training.datasets import SlabItem, StudyItem
from pe_app.training.run import Metrics, TrainingRun

logger = logging.getLogger(__name__)

ItemMetrics = dict[str, Tensor]
"""Metrics per item of a batch or pass, ``(items,)`` each: losses, logit, label, ..."""

Schedule = Literal["constant", "cosine"]
"""How the learning rate goes from epoch to epoch."""

Item = TypeVar("Item", SlabItem, StudyItem)


class LoopSettings(Protocol):
    """What the loop needs of a training's settings."""

    @property
    def batch(self) -> int:
        """Items per train step."""

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
    score: Callable[[Item, torch.Generator | None], ItemMetrics],
    settings: LoopSettings,
    order: Callable[[torch.Generator], list[int]] | None = None,
) -> None:
    """Train the epochs that are not done yet, and keep each when it ends.

    Args:
        run: the training; knows the epochs that are done, keeps new ones, reports progress.
        network: what is trained; on its device.
        optimiser: of its parameters.
        sides: training and validation.
        score: metrics per item of a batch: ``loss``, ``logit``, ``label`` and whatever else is to be averaged; gets a
            generator for augmentation while training, None while validating.
        settings: of the training.
        order: the items of one epoch of the training side, as many as it has; by default each once, in random order.

    Raises:
        InputError: if the loss is not finite any more.
    """
    with distributed.synchronised_batch_norm(network):
        scorer = _Scorer(network, score)
        several = distributed.world_size() > 1
        model = DistributedDataParallel(scorer) if several else scorer
        for epoch in range(len(run.state.history) + 1, settings.epochs + 1):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(settings, epoch)
            metrics = _epoch(run, epoch, scorer, model, optimiser, sides, settings, order)
            run.finish_epoch(network, optimiser, metrics)
            figures = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "epoch")
            if distributed.is_main():
                logger.info("%s: epoch %d of %d: %s", run.task, epoch, settings.epochs, figures)


def _epoch(
    run: TrainingRun,
    epoch: int,
    scorer: _Scorer[Item],
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    sides: tuple[Dataset[Item], Dataset[Item]],
    settings: LoopSettings,
    order: Callable[[torch.Generator], list[int]] | None,
) -> Metrics:
    """One pass over training and one over validation, and how they went."""
    device = next(scorer.parameters()).device
    clock = _Clock()
    steps = [math.ceil(len(side) / settings.batch) for side in sides]  # type: ignore[arg-type]
    done, total = (epoch - 1) * sum(steps), settings.epochs * sum(steps)
    passes: list[ItemMetrics] = []
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "epoch", epoch))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(settings.seed, "dropout", epoch))  # dropout knows no generator of its own
        for side, training in zip(sides, (True, False), strict=True):
            if settings.fresh_statistics and not training:
                _estimate_statistics(scorer, sides[0], settings)
            scored = []
            for batch in clock.waiting_for(_batches(side, settings, device, generator if training else None, order)):
                metrics = (
                    _train_step(model, optimiser, batch, generator) if training else _validation_step(scorer, batch)
                )
                scored.append(metrics)
                done += 1
                loss = _mean(metrics["loss"])
                if not math.isfinite(loss):
                    raise InputError(f"the loss in epoch {epoch} is {loss}: train anew with a lower learning rate")
                text = f"epoch {epoch} of {settings.epochs}, loss {loss:.3f}, waiting {clock.waiting:.0%}"
                with distributed.raised_together():
                    run.report(Progress(run.task, done, total, text))
            own = {name: torch.cat([part[name] for part in scored]) for name in scored[0]}
            passes.append({name: distributed.gather_rows(column)[0] for name, column in own.items()})
    seconds, waiting = clock.seconds, max(distributed.all_gather(clock.waiting))
    sums = {**_summary(passes[0], ""), **_summary(passes[1], "validation_")}
    return {"epoch": epoch, **sums, "seconds": seconds, "waiting": waiting}


def learning_rate(settings: LoopSettings, epoch: int) -> float:
    """Of an epoch, from 1 on: the same in all, or falling along half a cosine that would reach 0 after the last."""
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * (1 + math.cos(math.pi * (epoch - 1) / settings.epochs)) / 2


def derived_seed(seed: int, *words: object) -> int:
    """A seed for one purpose, as good as independent of those for others."""
    return int.from_bytes(hashlib.sha256(repr((seed, *words)).encode()).digest()[:7], "big")


class _Batch(NamedTuple, Generic[Item]):
    """The shard of this rank of a global batch.

    Attributes:
        items: may be empty in the last batch.
        own: their place in the global batch.
        total: items of the global batch.
    """

    items: Item
    own: slice
    total: int


class _Scorer(nn.Module, Generic[Item]):
    """A network together with its scoring, as the one module that ``DistributedDataParallel`` wraps."""

    def __init__(self, network: nn.Module, score: Callable[[Item, torch.Generator | None], ItemMetrics]) -> None:
        super().__init__()
        self.network = network
        self._score: Callable[[Item, torch.Generator | None], ItemMetrics] = score

    def forward(self, items: Item, generator: torch.Generator | None) -> ItemMetrics:
        """Metrics per item; items are augmented first where a generator is given."""
        return self._score(items, generator)


class _Clock:
    """How long an epoch takes, and how much of that the network waits for data."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._waited = 0.0

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.perf_counter() - self._begin

    @property
    def waiting(self) -> float:
        """Share of the time spent waiting."""
        return self._waited / self.seconds

    def waiting_for(self, batches: Iterator[_Batch[Item]]) -> Iterator[_Batch[Item]]:
        """The same batches; the time that each takes to come is counted."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch


def _batches(
    side: Dataset[Item],
    settings: LoopSettings,
    device: torch.device,
    shuffle: torch.Generator | None,
    drawn: Callable[[torch.Generator], list[int]] | None = None,
) -> Iterator[_Batch[Item]]:
    """The shards of this rank of one pass's batches, in random order or as ``drawn`` where a generator is given."""
    count = len(side)  # type: ignore[arg-type]
    if shuffle is None:
        order = list(range(count))
    else:
        order = drawn(shuffle) if drawn else torch.randperm(count, generator=shuffle).tolist()
    batches = [order[start : start + settings.batch] for start in range(0, count, settings.batch)]
    parts = [distributed.shard_slice(len(batch)) for batch in batches]
    loader: DataLoader[Item] = DataLoader(
        side,
        # a loader cannot return an empty batch: one item then, dropped below
        batch_sampler=[batch[own] or batch[:1] for batch, own in zip(batches, parts, strict=True)],
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own, or the loader would draw from the global one
    )
    for batch, own, items in zip(batches, parts, loader, strict=True):
        held = own.stop - own.start
        yield _Batch(type(items)(*(column[:held] for column in items)), own, len(batch))


def _train_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, batch: _Batch[Item], generator: torch.Generator
) -> ItemMetrics:
    """One optimiser step on the mean loss of the global batch."""
    model.train()
    alone = distributed.world_size() == 1
    with nullcontext() if alone else distributed.GlobalBatchDropout(batch.own, batch.total):
        metrics: ItemMetrics = model(batch.items, generator)
    losses = metrics["loss"]
    # gradients are averaged over the processes; an item may have several losses
    count = float(distributed.all_reduce_sum(torch.tensor(len(losses)))) / distributed.world_size()
    optimiser.zero_grad(set_to_none=True)
    (losses.sum() / count).backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return _kept(metrics)


@torch.no_grad()
def _validation_step(scorer: _Scorer[Item], batch: _Batch[Item]) -> ItemMetrics:
    """Metrics per item of a batch, without learning."""
    scorer.eval()
    return _kept(scorer(batch.items, None))


def _kept(metrics: ItemMetrics) -> ItemMetrics:
    return {name: column.detach().cpu() for name, column in metrics.items()}


def _mean(own: Tensor) -> float:
    """Mean of one metric over all ranks."""
    total, count = distributed.all_reduce_sum(
        torch.stack([own.double().sum(), torch.tensor(len(own)).double()])
    ).tolist()
    return float(total / count)


@torch.no_grad()
def _estimate_statistics(scorer: _Scorer[Item], side: Dataset[Item], settings: LoopSettings) -> None:
    """Running means and variances of all batch normalisations as plain averages over one pass in random order."""
    norms = [module for module in scorer.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    scorer.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    device = next(scorer.parameters()).device
    order = torch.Generator().manual_seed(derived_seed(settings.seed, "statistics"))
    for batch in _batches(side, settings, device, order):
        scorer(batch.items, None)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _summary(items: ItemMetrics, prefix: str) -> Metrics:
    """Means over one pass, accuracy, and the AUC (not a number while one class is missing)."""
    known = items["label"] >= 0
    logit, label = items["logit"][known].double(), items["label"][known]
    metrics = {
        name: float(column.double().nanmean()) for name, column in items.items() if name not in ("logit", "label")
    }
    metrics["accuracy"] = float(((logit > 0) == (label > 0)).double().mean())
    both = 0 < int(label.sum()) < len(label)
    if both:
        from sklearn.metrics import roc_auc_score  # a second to import, and the first steps do without

    metrics["auc"] = float(roc_auc_score(label.numpy(), logit.numpy())) if both else math.nan
    return {prefix + name: value for name, value in metrics.items()}
