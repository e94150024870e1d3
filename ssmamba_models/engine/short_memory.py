"""Telling a machine that is short of memory from a file or a model that is wrong."""

from __future__ import annotations

import torch


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is short: for a CPU's, torch has no class of error."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
