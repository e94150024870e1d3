"""Checks of the encoder's arguments: each error names the argument, its value and what was expected."""

# Called by modules that torch.fx traces: no `from __future__ import annotations`, see ssmamba.py.
from collections.abc import Sequence

import torch
from torch import Tensor

POOLS = ("", "avg", "max", "avgmax", "catavgmax")
SCAN_INITS = ("silent", "unit")


def check_encoder(
    in_chans: int,
    num_classes: int,
    dims: Sequence[int],
    depths: Sequence[int],
    scales: Sequence[Sequence[int]],
    drop_path_rate: float,
) -> None:
    """Arguments of SSMamba. Raises ValueError."""
    check_classes(num_classes)
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate is {drop_path_rate}, expected 0 or more and less than 1")
    if in_chans < 1:
        raise ValueError(f"in_chans is {in_chans}, expected at least 1")
    if not len(dims) == len(depths) == len(scales) or not dims:
        raise ValueError(
            f"dims, depths and scales hold {len(dims)}, {len(depths)} and {len(scales)} values, expected one per stage"
        )
    if min(dims) < 2 or min(depths) < 1:
        raise ValueError(f"dims is {dims} and depths is {depths}, expected widths of at least 2 and at least one block")


def check_classes(num_classes: int) -> None:
    """Raises ValueError for a negative number of classes."""
    if num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}, expected 0 (no classifier) or more")


def check_pool(global_pool: str) -> str:
    """The name of a global pooling, if there is one of that name. Raises ValueError."""
    if global_pool not in POOLS:
        raise ValueError(f"global_pool is {global_pool!r}, expected one of {', '.join(map(repr, POOLS))}")
    return global_pool


def check_dms(dim: int, scales: Sequence[int], d_state: int, dt_rank: int | None, scan_init: str) -> None:
    """Arguments of DMS. Raises ValueError."""
    if dim < 1:
        raise ValueError(f"DMS: dim is {dim}, expected at least 1")
    if not scales or min(scales) < 1 or len(scales) > dim:
        raise ValueError(f"DMS: scales is {scales}, expected 1 to {dim} factors (dim is {dim}), each at least 1")
    for name, value in (("d_state", d_state), ("dt_rank", dt_rank)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"DMS: {name} is {value}, expected a whole number of at least 1")
    if scan_init not in SCAN_INITS:
        raise ValueError(f"DMS: scan_init is {scan_init!r}, expected one of {', '.join(SCAN_INITS)}")


def check_hold(hold: Tensor, x: Tensor) -> None:
    """A hold mask for the map `x` (B, H, W, C), before pooling hides a wrong dtype or shape.

    Raises:
        TypeError: it is not bool.
        ValueError: its shape is not (B, H, W).
    """
    if hold.dtype != torch.bool:
        raise TypeError(f"DMS: hold must be a bool tensor, not {hold.dtype}; compare or cast it with .bool()")
    if hold.shape != x.shape[:3]:
        raise ValueError(f"DMS: hold has shape {tuple(hold.shape)}, expected (B, H, W) = {tuple(x.shape[:3])}")


def check_input_size(img_size: int | Sequence[int] | None, patch_size: int | Sequence[int] | None) -> None:
    """Arguments of timm's `set_input_size`. Raises ValueError."""
    if patch_size is not None:
        raise ValueError(f"patch_size is {patch_size}, but SSMamba has no patches: leave it out")
    if img_size is None:
        return
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size):
        raise ValueError(f"img_size is {img_size!r}, expected a positive int or (height, width)")
