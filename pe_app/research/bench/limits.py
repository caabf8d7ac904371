"""What this machine can do at most: products of large matrices, and copies of large blocks of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDES = (1024, 2048, 4096)
COPIED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Limits:
    """Rates of the machine.

    Attributes:
        device: that was measured.
        flops: floating-point operations a second of the best matrix product, by number format.
        bandwidth: bytes a second that are read and written by a copy.
    """

    device: torch.device
    flops: dict[torch.dtype, float]
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device, formats: tuple[torch.dtype, ...]) -> Limits:
        """A few seconds of products and copies."""
        return cls(device, {dtype: _product_rate(device, dtype) for dtype in formats}, _copy_rate(device))

    def compute(self, operations: float, dtype: torch.dtype) -> float:
        """Seconds that so many floating-point operations take at best."""
        return operations / self.flops[dtype]

    def move(self, count: float) -> float:
        """Seconds that it takes at best to read and write so many bytes in all."""
        return count / self.bandwidth


def best_seconds(function: Callable[[], object], repeats: int = 3, device: torch.device | None = None) -> float:
    """The shortest of some runs, after one that warms up caches and memory."""
    shortest = float("inf")
    for run in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        if run:
            shortest = min(shortest, time.perf_counter() - begin)
    return shortest


def operations(function: Callable[[], object]) -> float:
    """Floating-point operations of the convolutions and matrix products of a call, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    best = 0.0
    for side in SIDES:
        one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = max(best, 2.0 * side**3 / best_seconds(lambda a=one, b=other: a @ b, 5, device))  # type: ignore[misc]
    return best


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * COPIED_BYTES / best_seconds(lambda: target.copy_(source), 5, device)
