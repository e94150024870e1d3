"""How the maps of an encoder become one vector: as the model does, or with how much they vary over the tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmamba_models.choices import POOLS


class PoolError(ValueError):
    """A model does not give the maps that a pool needs."""


def check_pool(pool: str) -> None:
    """Raises ValueError for a pool that is not one of `POOLS`."""
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}, expected one of {', '.join(POOLS)}")


def pool_features(model: nn.Module, images: Tensor, pool: str) -> Tensor:
    """Features of images.

    "mean_std" puts two vectors side by side: the mean of the last map over the tile, and its standard deviation, each
    normalised over its channels (LayerNorm without weights), so that neither drowns the other. A mean alone says how
    much there is of something, not whether it lies evenly or in places: on LC25000's colon tiles a linear probe of
    `ssmamba_tiny` reached 0.90 with it and 0.98 with both. "mean_std_last2" puts those of the map before the last in
    front: its places are finer, and between folds of LC25000's train split a linear probe of `ssmamba_small` rose from
    0.898 to 0.913 on lung and from 0.929 to 0.950 on colon. "mean_std_last4" takes the last four, which of a model of
    stages are most often all: stain and texture beside structure. There a linear probe of `ssmamba_tiny` rose by it
    from 0.926 to 0.935 and from 0.962 to 0.967, and kNN on colon from 0.921 to 0.925 (on lung it stayed at 0.928).

    Args:
        model: a timm encoder without classifier, in eval mode; its `forward_features` gives a map, channels first or
            last (`output_fmt`), or tokens, of which class and register tokens are left out.
        images: (B, 3, H, W).
        pool: one of `POOLS`.

    Returns:
        (B, D): D = 2 C for "mean_std" of a map of C channels, 2 (C' + C) for "mean_std_last2" where the map before has
        C' channels (that of the stage before in a model of stages, of the block before in a transformer), and so on.

    Raises:
        ValueError: pool is not one of `POOLS`.
        PoolError: the model does not give the maps or tokens that the pool needs.
    """
    check_pool(pool)
    if pool == "model":
        return model(images)
    if POOLS[pool] == 1:
        # nn.Module says that its attributes are tensors or modules.
        forward_features = cast(Callable[[Tensor], Tensor], model.forward_features)
        return pool_maps(model, forward_features(images), (), pool)
    return pool_maps(model, *last_maps(model, images, POOLS[pool]), pool)


def last_maps(
    model: nn.Module, images: Tensor, count: int, cure: str = "use --pool mean_std"
) -> tuple[Tensor, list[Tensor]]:
    """What `model.forward_features` gives of (B, 3, H, W), and the last `count` maps (B, C, h, w).

    `cure` ends the errors.

    Raises:
        PoolError: the model gives no intermediate maps, fewer, or none that are normalised as its last one.
    """
    name = type(model).__name__
    if not hasattr(model, "forward_intermediates"):
        raise PoolError(f"{name} has no intermediate maps (forward_intermediates); {cure}")
    forward_intermediates = cast(Callable[..., tuple[Tensor, list[Tensor]]], model.forward_intermediates)
    try:
        return forward_intermediates(images, indices=count, norm=True, output_fmt="NCHW")
    except AssertionError as error:  # which is how timm says so
        reason = str(error) or "an assertion of its forward_intermediates"
        raise PoolError(f"{name} does not give its last {count} maps ({reason}); {cure}") from error


def pool_maps(model: nn.Module, last: Tensor, maps: Sequence[Tensor], pool: str) -> Tensor:
    """Features from what `last_maps` gave; shapes, errors and `pool` as there and in `pool_features`. The last map is
    taken from `last`, so `maps` may be empty where the pool needs no other."""
    if pool == "model":
        return cast(Callable[[Tensor], Tensor], model.forward_head)(last)
    earlier = [spatial.flatten(2).transpose(1, 2) for spatial in maps[-POOLS[pool] : -1]]
    return torch.cat([_mean_std(places.float()) for places in (*earlier, _places(model, last))], dim=-1)


def _mean_std(places: Tensor) -> Tensor:
    """(B, N, C) -> (B, 2 C), see `pool_features`."""
    spread, mean = torch.std_mean(places, dim=1, correction=0)
    width = mean.shape[-1:]
    return torch.cat([F.layer_norm(mean, width), F.layer_norm(spread, width)], dim=-1)


def _places(model: nn.Module, features: Tensor) -> Tensor:
    """(B, N, C) float32: the features of every place."""
    if isinstance(features, Tensor) and features.ndim == 4:
        channels_last = str(getattr(model, "output_fmt", "NCHW")) == "NHWC"
        return (features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)).float()
    if isinstance(features, Tensor) and features.ndim == 3:
        return features[:, getattr(model, "num_prefix_tokens", 0) :].float()
    what = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    raise PoolError(
        f"{type(model).__name__}.forward_features gives {what}, which has no places to pool; use --pool model"
    )
