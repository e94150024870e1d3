"""Which tiles lie next to which: a grid hash over the tiles of all slides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn


class SpatialManifest(Protocol):
    """Tiles that know where they lay: N entries each."""

    slides: Sequence[str]
    x: np.ndarray
    y: np.ndarray


class SpatialNeighborIndex(nn.Module):
    """Finds the tiles of the same slide nearer than a radius.

    Every place of every slide has a number; those that hold a tile are kept sorted, so that a query is a binary search
    for each place within the radius. Memory: 32 bytes for each tile.

    Args:
        manifest: `slides` (N names), `x` and `y` (N whole numbers, in grid units: neighbours differ by 1).
        radius: grid units; neighbours are at a distance above 0 and below it. 3 takes the 24 others of a 5 x 5 window.

    Raises:
        ValueError: no place lies within the radius, columns of different lengths, coordinates that are no whole
            numbers or too far apart to be numbered, or two tiles of a slide in one place.

    Source: SGCL (Lin et al., Medical Image Analysis 89, 102845, 2023), intra-invariance.
    """

    def __init__(self, manifest: SpatialManifest, radius: float = 3.0) -> None:
        super().__init__()
        offsets = _offsets(radius)
        names, slide = np.unique(np.asarray(manifest.slides, dtype=str), return_inverse=True)
        x, y = _whole("x", manifest.x), _whole("y", manifest.y)
        if not len(slide) == len(x) == len(y):
            raise ValueError(f"there are {len(slide)} slides, {len(x)} x and {len(y)} y; expected one of each per tile")
        # Around each slide a margin as wide as the reach: what is looked for beyond an edge is in no other slide.
        reach = int(np.abs(offsets).max())
        columns, rows = (int(axis.max()) - int(axis.min()) + 1 + 2 * reach for axis in (x, y))
        if len(names) * columns * rows >= 2**63:
            raise ValueError(
                f"the coordinates span {columns} x {rows} places in {len(names)} slides, too many to number; expected "
                "grid units: x = (pixel column) / (step between tiles)"
            )
        place = (slide.astype(np.int64) * columns + (x - x.min() + reach)) * rows + (y - y.min() + reach)
        order = np.argsort(place, kind="stable")
        taken = np.flatnonzero(np.diff(place[order]) == 0)
        if len(taken):
            one, other = sorted(order[taken[0] : taken[0] + 2].tolist())
            raise ValueError(
                f"tiles {one} and {other} both lie at x {x[one]}, y {y[one]} of slide {str(names[slide[one]])!r}; "
                "a place holds one tile"
            )
        for name, values in (
            ("place", place),
            ("order", order),
            ("sorted_places", place[order]),
            ("slide", slide.astype(np.int64)),
            ("steps", offsets[:, 0] * rows + offsets[:, 1]),
        ):
            # Made of the manifest, which every process and every checkpoint has anyway.
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(values)), persistent=False)

    def __len__(self) -> int:
        return len(self.place)

    def query(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The neighbours of tiles.

        Args:
            index: (B,) int64, tiles.

        Returns:
            (B, K) int64, the tile at each of the K places within the radius (where there is none, the tile asked for),
            and (B, K) bool, whether there is one.
        """
        wanted = self.place[index][:, None] + self.steps
        found = torch.searchsorted(self.sorted_places, wanted).clamp_max(len(self.place) - 1)
        valid = self.sorted_places[found] == wanted
        return torch.where(valid, self.order[found], index[:, None]), valid


def _offsets(radius: float) -> np.ndarray:
    """(K, 2) int64: steps in x and y to the places at a distance above 0 and below `radius`."""
    if not 1 < radius < 1000:
        raise ValueError(f"radius is {radius}, expected more than 1 grid unit (next neighbours) and less than 1000")
    reach = math.ceil(radius)
    steps = np.arange(-reach, reach + 1)
    x, y = (axis.reshape(-1) for axis in np.meshgrid(steps, steps, indexing="ij"))
    squares = x**2 + y**2
    near = (squares > 0) & (squares < radius**2)
    return np.stack([x[near], y[near]], axis=1).astype(np.int64)


def _whole(name: str, values: np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} has shape {array.shape}, expected one number for each tile")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} is of type {array.dtype}, expected whole numbers: coordinates in grid units")
    return array.astype(np.int64)
