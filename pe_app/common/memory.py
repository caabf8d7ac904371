"""How the C library keeps memory that tensors have freed."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_NEVER = 2**31 - 1
_GROWTH = 2**28


def keep_freed_memory() -> None:
    """Let this process keep large freed blocks for the next tensor, instead of returning each to the system.

    By default glibc maps every large block anew, and the system clears it page by page: of a detection's processor time
    a sixth. All threads share one arena: an arena of a server's thread could not hold a large block. The process keeps
    its peak until it ends. Elsewhere than on glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _GROWTH)):
            mallopt(option, value)
