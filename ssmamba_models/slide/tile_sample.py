"""Some of the tiles of a slide: drawn, and picked from batches."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_tiles(count: int, limit: int, generator: torch.Generator | None = None) -> Tensor:
    """Places of `limit` of `count` tiles, drawn without replacement, in order; of all where they are no more.

    Returns:
        (min(count, limit),) int64.
    """
    if count <= limit:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:limit].sort().values


def smallest(noise: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Where the `count` (B,) smallest of noise (B, n) stand, of those at which mask (B, n) is True: (B, n) bool."""
    order = noise.masked_fill(~mask, torch.inf).argsort(dim=1, stable=True)
    chosen = torch.arange(noise.shape[1], device=noise.device) < count[:, None]
    return torch.zeros_like(mask).scatter(1, order, chosen)


def front_places(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Where the chosen tiles of each slide stand, in order.

    Args:
        chosen: (B, N) bool.

    Returns:
        Places (B, V), V the most of any slide, all different in a slide; and which are chosen, (B, V) bool: where a
        slide has fewer, the last are not.
    """
    most = int(chosen.sum(1).max())
    place = (~chosen).byte().argsort(dim=1, stable=True)[:, :most]
    return place, chosen.gather(1, place)


def pick_tiles(x: Tensor, place: Tensor) -> Tensor:
    """(B, N, C) at places (B, V) -> (B, V, C)."""
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))
