"""InfoNCE over the batch of all processes: each vector must find its partner among those of all images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmamba_models.layers.gather_rows import gather_rows, place_of_rows


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each query's key by cosine similarity; arguments and errors as `two_way_info_nce`.

    Args:
        queries, keys: (B, D); row i of one is the partner of row i of the other.
        temperature: divides the cosines.

    Returns:
        A scalar: the mean over this process's queries.
    """
    place, rows = place_of_rows(len(queries))
    if rows < 2:
        raise ValueError(
            f"a contrastive loss over {rows} tile has nothing to choose from; use a larger --batch-size or fewer parts "
            "(--accumulate), or another loss (MAMIM: --set method_args.alignment=cosine)"
        )
    partner = torch.arange(place, place + len(queries), device=queries.device)
    # Products in bfloat16 would leave two digits of a cosine, which the temperature then magnifies.
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = F.normalize(queries.float(), dim=-1), F.normalize(keys.float(), dim=-1)
        return F.cross_entropy(queries @ gather_rows(keys).T / temperature, partner)


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
    return (info_nce(first, second, temperature) + info_nce(second, first, temperature)) / 2
