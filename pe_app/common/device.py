"""Where and in which number format the networks run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
"""``auto``: bfloat16 where the processor multiplies it faster than float32, else float32."""


def best_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: Precision = "auto") -> AbstractContextManager[object]:
    """The context in which a network runs at that precision; weights and optimiser stay float32."""
    if precision == "float32" or (precision == "auto" and not _fast_bfloat16(device.type)):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def unshortened(device: torch.device) -> AbstractContextManager[object]:
    """The context inside ``autocast`` in which nothing is shortened."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@cache
def _fast_bfloat16(device_type: str) -> bool:
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # AVX-512 BF16 or AMX; elsewhere bfloat16 is emulated, several times slower than float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
