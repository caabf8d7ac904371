"""Where and in which number format the networks run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
"""``auto``: bfloat16 where the processor multiplies it faster than float32, else float32."""

DetectingPrecision = Literal[Precision, "int8"]
"""A detection also has ``int8``: most convolutions in 8-bit integers, on the CPU; all else as with ``auto``."""


def best_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: DetectingPrecision = "auto") -> AbstractContextManager[object]:
    """The context in which a network runs at that precision; weights and optimiser stay float32."""
    if precision == "float32" or (precision != "bfloat16" and not _fast_bfloat16(device.type)):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@cache
def _fast_bfloat16(device_type: str) -> bool:
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # AVX-512 BF16 or AMX; elsewhere bfloat16 is emulated, several times slower than float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
