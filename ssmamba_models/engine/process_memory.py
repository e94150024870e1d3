"""Memory of a process that runs models: large blocks are kept for the next map instead of going back to the system."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 2**30  # bytes
LARGEST_INT = 2**31 - 1

_done = False


def large_blocks_kept() -> bool:
    """Whether `keep_large_blocks` was called in this process, and worked: there is no way back."""
    return _done


def keep_large_blocks() -> bool:
    """Make glibc keep freed blocks of up to 1 GiB for reuse.

    By default it maps every block above 32 MB anew, and the system clears each page at its first touch: a tenth to a
    fifth of the time of a CPU forward or training step on large maps. The process's memory then shrinks later. A
    command owns its process and may decide this; a library does not, so importing the package changes nothing.

    Returns:
        Whether it was done: not where malloc is another one, nor where the user has tuned it (MALLOC_* or
        GLIBC_TUNABLES).
    """
    global _done
    mallopt = _find_mallopt()
    if mallopt is None:
        return False
    _done = bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
    return _done


def can_keep_large_blocks() -> bool:
    """Whether `keep_large_blocks` finds a malloc that it may tune; changes nothing."""
    return _find_mallopt() is not None


def _find_mallopt() -> Callable[[int, int], int] | None:
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return None
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # musl, macOS and Windows have none
        return None
