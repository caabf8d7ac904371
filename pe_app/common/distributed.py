"""Data-parallel training as torchrun starts it: the process group, shards, collectives, global-batch statistics.

Every process makes the same calls in the same order. In a program that was started alone the world size is 1, and
every collective here returns its own input. Rank 0 is the main process: it alone writes files and reports progress.
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
"""Cores that one process can use for its worker processes."""

TIMEOUT = timedelta(days=7)
"""One rank may prepare studies for hours while the others wait; torchrun itself notices when one of them ends."""


@contextmanager
def process_group() -> Iterator[None]:
    """The group of processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are set).

    NCCL on GPUs, one per process, gloo on CPUs. Without torchrun nothing happens.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps its store when it starts all again, with the addresses of those that have ended
    again = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=again, rank=number, world_size=count, timeout=TIMEOUT)
    yield
    dist.destroy_process_group()  # not after an error: the others may not come here any more


def world_size() -> int:
    """Processes in the group; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the group, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes files and reports progress."""
    return rank() == 0


def shard_slice(total: int) -> slice:
    """The contiguous shard of ``total`` items that belongs to this rank; shard sizes differ by at most one."""
    return slice(rank() * total // world_size(), (rank() + 1) * total // world_size())


def cores_per_process() -> int:
    """CPU cores for each of the processes on this machine, at most ``MOST_WORKERS``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), MOST_WORKERS)


def default_loader_workers() -> int:
    """Data loader workers: all other cores for a training on a GPU, none on the CPU, which needs them itself."""
    return cores_per_process() - 1 if torch.cuda.is_available() else 0


def all_gather(own: T) -> list[T]:
    """One object from every rank, in the order of ranks."""
    if world_size() == 1:
        return [own]
    everything: list[T] = [own] * world_size()
    dist.all_gather_object(everything, own)
    return everything


def shard(jobs: Sequence[Job]) -> Sequence[Job]:
    """The shard of this rank, of jobs that all ranks know: every ``world_size``-th, starting at ``rank``."""
    return jobs[rank() :: world_size()]


def gather_shards(own: Sequence[T]) -> list[T]:
    """Results of all jobs in their order, from the results of each rank's ``shard``."""
    parts = all_gather(own)
    return [parts[number % world_size()][number // world_size()] for number in range(sum(map(len, parts)))]


def map_sharded(make: Callable[[Job], T], jobs: Sequence[Job]) -> list[T]:
    """``make(job)`` of every job on all ranks; each rank computes its own shard."""
    with raised_together():
        own = [make(job) for job in shard(jobs)]
    return gather_shards(own)


@contextmanager
def raised_together() -> Iterator[None]:
    """A block that all ranks leave together: an ``InputError`` or ``Cancelled`` on one of them is raised on all."""
    if world_size() == 1:
        yield
        return
    error: InputError | Cancelled | None = None
    try:
        yield
    except (InputError, Cancelled) as raised:
        error = raised
    first = next((each for each in all_gather(error) if each is not None), None)
    if first is not None:
        raise first


def from_main(work: Callable[[], T]) -> T:
    """Result of ``work`` on the main process, broadcast to all ranks; so is its error."""
    if world_size() == 1:
        return work()
    result: list[T | None] = [None]
    with raised_together():
        if is_main():
            result = [work()]
    dist.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]


def all_reduce_sum(own: Tensor) -> Tensor:
    """Sum over all ranks of a tensor on the CPU; without gradient."""
    total = own.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_rows(own: Tensor) -> tuple[Tensor, slice]:
    """All rows of a small tensor whose rows are spread over the ranks, and the slice of this rank's own."""
    if world_size() == 1:
        return own, slice(0, len(own))
    rows = all_gather(own.cpu())
    start = sum(len(each) for each in rows[: rank()])
    return torch.cat(rows).to(own.device), slice(start, start + len(own))


class GlobalBatchDropout(TorchFunctionMode):
    """Within, dropout masks are drawn for the global batch: each item gets the mask it would get in a single process.

    Args:
        own: the items of the global batch that this rank holds.
        total: items of the global batch.
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
def synchronised_batch_norm(network: nn.Module) -> Iterator[None]:
    """Within, batch normalisation uses mean and variance of the global batch; names, weights and buffers stay."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    if world_size() > 1:
        for module in list(network.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    setattr(module, name, _synchronised(child))
                    replaced.append((module, name, child))
    try:
        yield
    finally:
        for module, name, child in replaced:
            child.train(getattr(module, name).training)
            setattr(module, name, child)


def _synchronised(norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    """A synchronised layer that shares the weights and running statistics of ``norm``."""
    kind = nn.SyncBatchNorm if next(norm.parameters()).is_cuda else SyncBatchNormOnCpu
    made = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made._parameters, made._buffers = norm._parameters, norm._buffers
    return made.train(norm.training)


class SyncBatchNormOnCpu(nn.modules.batchnorm._BatchNorm):
    """torch's ``SyncBatchNorm`` for CPUs, where torch has none; with weights, for batches of any number of axes."""

    def forward(self, x: Tensor) -> Tensor:
        """Batch normalisation over the global batch; ``x`` may be empty on a rank."""
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = all_reduce_sum(torch.tensor(x.numel() // x.shape[1])).item()
        mean: Tensor = _AllReduceSum.apply(wide.sum(axes)) / count
        deviation = wide - mean.view(shape)
        # squares of deviations, not of values, whose difference would lose digits
        variance: Tensor = _AllReduceSum.apply(deviation.square().sum(axes)) / count
        self._remember(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt() * self.weight
        return (deviation * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics; without a momentum they are cumulative averages."""
        batches = self.num_batches_tracked
        if batches is None or self.running_mean is None or self.running_var is None:
            return
        batches.add_(1)
        share = 1 / float(batches) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _AllReduceSum(torch.autograd.Function):
    """Sum over all ranks, with its gradient: the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: object, own: Tensor) -> Tensor:
        return all_reduce_sum(own)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)
