"""Several processes that train one model together, as torchrun starts them: who this one is, what all of them know.

Every process does the same calls in the same order. In a program that was started alone there is one process, and
every function here does what is plain then. Process 0 is the main one: it alone writes and tells the progress.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.overrides import TorchFunctionMode

from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled

T = TypeVar("T")
Job = TypeVar("Job")

MOST_WORKERS = 16
"""Cores that one process can make use of, for others that prepare and read for it."""

PATIENCE = timedelta(days=7)
"""One process may prepare studies for hours while the others wait; torchrun itself sees when one of them ends."""


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set).

    NCCL joins their GPUs, one each, and gloo their processors. Without torchrun nothing happens.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    store, number, count = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun keeps its store when it starts all again, with the addresses of those that have ended
    again = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=again, rank=number, world_size=count, timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: the others may not come here any more


def size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and tells."""
    return rank() == 0


def part(total: int) -> slice:
    """Which of ``total`` things, in a row that all processes know, this one takes; sizes differ by at most one."""
    return slice(rank() * total // size(), (rank() + 1) * total // size())


def processors() -> int:
    """Processor cores for each of the processes on this machine; more than some are of no use to it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), MOST_WORKERS)


def worth_reading_ahead() -> int:
    """Processes that read ahead for a training that runs on a GPU; a training on the processor needs it for itself."""
    return processors() - 1 if torch.cuda.is_available() else 0


def gathered(own: T) -> list[T]:
    """What every process brings, in their order."""
    if size() == 1:
        return [own]
    everything: list[T] = [own] * size()
    dist.all_gather_object(everything, own)
    return everything


def dealt(jobs: Sequence[Job]) -> Sequence[Job]:
    """The jobs of a row, known to all processes, that this one does."""
    return jobs[rank() :: size()]


def collected(own: Sequence[T]) -> list[T]:
    """What came of all jobs, in their order, from what came of those that were dealt to each process."""
    parts = gathered(own)
    return [parts[number % size()][number // size()] for number in range(sum(map(len, parts)))]


def shared(make: Callable[[Job], T], jobs: Sequence[Job]) -> list[T]:
    """``make(job)`` of every job, each process doing those dealt to it."""
    with agreed():
        own = [make(job) for job in dealt(jobs)]
    return collected(own)


@contextmanager
def agreed() -> Iterator[None]:
    """A block that all processes leave together: if one of them meets bad input or is asked to stop, all raise that."""
    if size() == 1:
        yield
        return
    error: InputError | Cancelled | None = None
    try:
        yield
    except (InputError, Cancelled) as raised:
        error = raised
    first = next((each for each in gathered(error) if each is not None), None)
    if first is not None:
        raise first


def from_main(work: Callable[[], T]) -> T:
    """What the main process makes, or the error it met, for all."""
    if size() == 1:
        return work()
    result: list[T | None] = [None]
    with agreed():
        if is_main():
            result = [work()]
    dist.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]


def summed(own: Tensor) -> Tensor:
    """The sum over all processes of a tensor on the CPU; without gradient."""
    total = own.detach().clone()
    if size() > 1:
        dist.all_reduce(total)
    return total


def whole(own: Tensor) -> tuple[Tensor, slice]:
    """A small tensor of which every process holds some rows, complete, and which rows are its own."""
    if size() == 1:
        return own, slice(0, len(own))
    rows = gathered(own.cpu())
    start = sum(len(each) for each in rows[: rank()])
    return torch.cat(rows).to(own.device), slice(start, start + len(own))


class DropoutOfWholeBatch(TorchFunctionMode):
    """Within, dropout is drawn for the whole batch: each item loses what it would lose in one process alone.

    Args:
        own: the items of the batch that this process holds.
        total: items of the batch.
    """

    def __init__(self, own: slice, total: int) -> None:
        super().__init__()
        self._own, self._total = own, total

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return (self._dropout if function is F.dropout else function)(*args, **(kwargs or {}))

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training:
            return x
        return x * F.dropout(x.new_ones((self._total, *x.shape[1:])), p)[self._own]


@contextmanager
def normalising_whole_batches(network: nn.Module) -> Iterator[None]:
    """Within, batch normalisation uses mean and variance of the whole batch; names, weights and buffers stay."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    if size() > 1:
        for module in list(network.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    setattr(module, name, _of_whole_batches(child))
                    replaced.append((module, name, child))
    try:
        yield
    finally:
        for module, name, child in replaced:
            child.train(getattr(module, name).training)
            setattr(module, name, child)


def _of_whole_batches(norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    """To be put in the place of ``norm``, with its weights and running statistics themselves."""
    kind = nn.SyncBatchNorm if next(norm.parameters()).is_cuda else WholeBatchNorm
    made = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made._parameters, made._buffers = norm._parameters, norm._buffers
    return made.train(norm.training)


class WholeBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What torch's ``SyncBatchNorm`` is on GPUs, on processors; with weights, for batches of any number of axes."""

    def forward(self, x: Tensor) -> Tensor:
        """As of every batch normalisation; ``x`` may hold no item."""
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = summed(torch.tensor(x.numel() // x.shape[1])).item()
        mean: Tensor = _SumOfAll.apply(wide.sum(axes)) / count
        deviation = wide - mean.view(shape)
        # squares of deviations, not of values, whose difference would lose digits
        variance: Tensor = _SumOfAll.apply(deviation.square().sum(axes)) / count
        self._remember(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt() * self.weight
        return (deviation * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Into the running statistics; without a momentum they are plain averages."""
        batches = self.num_batches_tracked
        if batches is None or self.running_mean is None or self.running_var is None:
            return
        batches.add_(1)
        share = 1 / float(batches) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _SumOfAll(torch.autograd.Function):
    """The sum over all processes; what it is used for in each of them is felt in all."""

    @staticmethod
    def forward(ctx: object, own: Tensor) -> Tensor:
        return summed(own)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return summed(gradient)
