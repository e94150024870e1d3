"""The views of Giga-SSL: a few tiles of one shared-augmentation bag, their places turned, mirrored and scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssmamba_models.slide.slide_tiles import SlideTiles


class GigaSSLViews:
    """Draw two views of a slide.

    Each is drawn on its own: one of the slide's bags, then tiles of it with replacement; their places are rotated by a
    uniform angle, mirrored on each axis with probability 0.5, and scaled on each axis. (The encoder then cuts them to
    whole cells.) A slide without bags gives its plain tiles: see `SlideTiles.bags`.

    Args:
        tiles: T, tiles of a view.
        scale: smallest and largest factor on each axis.
        shared_aug: whether bags are used where there are any; False always takes plain tiles.

    Call: a `SlideTiles` and a torch.Generator -> dict of features (2, T, D) and grid (2, T, 2), float32.

    The generator alone decides: the same seed gives the same views.

    Raises:
        ValueError: an argument out of its range, named.

    Source: Lazard et al., Giga-SSL (arXiv:2212.03273), section 3.
    """

    def __init__(self, tiles: int = 5, scale: Sequence[float] = (0.7, 1.3), shared_aug: bool = True) -> None:
        if tiles < 1:
            raise ValueError(f"tiles is {tiles}, expected 1 or more")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] < math.inf:
            raise ValueError(f"scale is {tuple(scale)}, expected (smallest, largest), both above 0")
        self.tiles, self.scale, self.shared_aug = tiles, tuple(scale), shared_aug

    def __call__(self, slide: SlideTiles, generator: torch.Generator) -> dict[str, Tensor]:
        features, grid = zip(*(self._view(slide, generator) for _ in range(2)))
        return {"features": torch.stack(features), "grid": torch.stack(grid)}

    def _view(self, slide: SlideTiles, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        features, grid = slide.features, slide.grid
        if self.shared_aug and slide.bags is not None:
            features, grid = slide.bags[int(torch.randint(len(slide.bags), (), generator=generator))]
        drawn = torch.randint(len(features), (self.tiles,), generator=generator)
        return features[drawn], self._transform(grid[drawn], generator)

    def _transform(self, grid: Tensor, generator: torch.Generator) -> Tensor:
        turn, *draws = torch.rand(5, generator=generator).tolist()
        cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
        least, most = self.scale
        factors = [
            (-1 if flip < 0.5 else 1) * (least + size * (most - least)) for flip, size in zip(draws[:2], draws[2:])
        ]
        # From the first tile: numbers stay small, and float32 exact enough, wherever the tiles lie.
        return (grid - grid[0]) @ torch.tensor([[cos, sin], [-sin, cos]]) * torch.tensor(factors)
