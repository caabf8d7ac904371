"""On which device and in which dtype the networks run."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch

from pe_app.common.errors import InputError

DEVICE_VARIABLE = "PE_DEVICE"
"""Environment variable that names the device; ``pe-app ... --device`` sets it, so that child processes follow."""

Precision = Literal["auto", "float32", "bfloat16"]
"""``auto``: bfloat16 where the processor multiplies it faster than float32, else float32."""


def best_device() -> torch.device:
    """The device that ``PE_DEVICE`` names; otherwise the first CUDA device where there is one, else the CPU.

    Raises:
        InputError: if torch cannot use the named device on this machine.
    """
    named = os.environ.get(DEVICE_VARIABLE, "")
    if not named:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(named)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"device {named}: torch {torch.__version__} cannot use it ({reason}): choose cpu, or cuda where "
            "the machine has an NVIDIA GPU and torch was installed for it"
        ) from error
    return device


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
