"""Tensors where a processor may read them: at a multiple of their elements' size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def aligned(x: Tensor) -> Tensor:
    """x itself, or a contiguous copy of a tensor at an odd address, as torch.frombuffer and DLPack hand them in.

    C leaves undefined what reading such memory does, and a GPU faults. The copy goes byte by byte.

    Example:
        >>> raw = torch.zeros(4 * 6 + 1, dtype=torch.uint8).numpy()
        >>> odd = torch.frombuffer(raw, dtype=torch.float32, count=6, offset=1)
        >>> odd.data_ptr() % 4, aligned(odd).data_ptr() % 4
        (1, 0)
    """
    if x.data_ptr() % x.element_size() == 0:
        return x
    return x[..., None].view(torch.uint8).clone(memory_format=torch.contiguous_format).view(x.dtype)[..., 0]


def all_aligned(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Each of them :func:`aligned`; None stays None."""
    return tuple(None if x is None else aligned(x) for x in tensors)
