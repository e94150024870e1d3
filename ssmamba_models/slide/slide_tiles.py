"""The tiles of one slide in memory: what the views of slide-level self-supervision are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlideTiles:
    """The tiles of one slide.

    Attributes:
        features: (N, D) float32.
        grid: (N, 2) float32, (x, y) of each tile in tiles: `coords / patch_size_level0`.
        bags: shared-augmentation bags (`ssmamba extract --shared-aug`): pairs of features (n, D) and grid (n, 2), all
            tiles of one under the same augmentation. Any sequence: one that reads a bag when it is asked for will do.
            None where there are none.

    Raises:
        ValueError: shapes or types that do not fit, or no tile.
    """

    features: Tensor
    grid: Tensor
    bags: Sequence[tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        features, grid = self.features, self.grid
        if features.dim() != 2 or len(features) == 0:
            raise ValueError(f"a slide's features have shape {tuple(features.shape)}, expected (N, D), N 1 or more")
        if tuple(grid.shape) != (len(features), 2):
            raise ValueError(f"a slide's grid has shape {tuple(grid.shape)}, expected (N, 2) = {(len(features), 2)}")
        for name, values in (("features", features), ("grid", grid)):
            if values.dtype != torch.float32:
                raise ValueError(f"a slide's {name} are {values.dtype}, expected float32; cast them with .float()")
        if self.bags is not None and len(self.bags) == 0:
            raise ValueError("a slide's bags are empty; give None where there are none")

    def __len__(self) -> int:
        return len(self.features)
