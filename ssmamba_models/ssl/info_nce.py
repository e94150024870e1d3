"""InfoNCE over the batch of all processes: each vector must find its partner among those of all images."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def two_way_info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each row's partner by cosine similarity, first to second and second to first.

    In distributed training the candidates are the rows of all processes, and gradients flow to them there; with the
    mean that DDP takes of gradients, loss and gradients are those of one process with the whole batch.

    Args:
        first, second: (B, D); row i of one is the partner of row i of the other. B is the same on all processes.
        temperature: divides the cosines.

    Returns:
        A scalar: the mean over this process's rows.

    Raises:
        ValueError: there is but one row in all, and so nothing to choose from.

    Source: InfoNCE, arXiv:1807.03748, eq. 4.
    """
    rows = len(first) * (dist.get_world_size() if _distributed() else 1)
    if rows < 2:
        raise ValueError(
            f"a contrastive loss over {rows} tile has nothing to choose from; use a larger --batch-size or fewer parts "
            "(--accumulate), or another loss (MAMIM: --set method_args.alignment=cosine)"
        )
    first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    place = len(first) * (dist.get_rank() if _distributed() else 0)
    partner = torch.arange(place, place + len(first), device=first.device)
    # Products in bfloat16 would leave two digits of a cosine, which the temperature then magnifies.
    with torch.autocast(first.device.type, enabled=False):
        forth = F.cross_entropy(first @ _of_all(second).T / temperature, partner)
        back = F.cross_entropy(second @ _of_all(first).T / temperature, partner)
    return (forth + back) / 2


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _of_all(rows: Tensor) -> Tensor:
    return _GatherRows.apply(rows) if _distributed() else rows


class _GatherRows(torch.autograd.Function):
    """(B, D) of each process -> (processes * B, D) on every one; backward sums what all have for this one's rows."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
