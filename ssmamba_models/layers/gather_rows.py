"""Rows of all processes: what a contrastive loss over the batch of all of them compares."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Bring the rows of all processes together, in the order of the processes; gradients flow back to their owners.

    Backward sums what all processes have for a row: with the mean that DDP takes of gradients, loss and gradients are
    those of one process with the whole batch. One process alone gets its rows as they are.

    Args:
        rows: (B, ...) of this process; B is the same on all.

    Returns:
        (processes * B, ...), the same on every process.
    """
    return _GatherRows.apply(rows) if is_distributed() else rows


def place_of_rows(count: int) -> tuple[int, int]:
    """Where this process's rows stand in what `gather_rows` gives.

    Args:
        count: B, rows of each process.

    Returns:
        The place of the first of them, and how many rows there are in all.
    """
    if not is_distributed():
        return 0, count
    return dist.get_rank() * count, dist.get_world_size() * count


def is_distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
