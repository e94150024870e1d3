"""Where a slide's tiles lie: a grid at an exact mpp, and how much tissue each of them shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ssmamba_models.data.tile_geometry import is_enlarged
from ssmamba_models.wsi.mpp import check_mpp
from ssmamba_models.wsi.tissue import TissueMask

# A tile that would show less than this of the slide, in level-0 px, is not added at its right or lower end.
_SLIVER = 1.0


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a slide, row by row.

    Attributes:
        coords: (N, 2) int64, top-left corners (x, y), level-0 px; at most half a pixel off the exact grid.
        tile_size: T, px at `target_mpp`.
        overlap: px at `target_mpp` that neighbours share.
        target_mpp: um per px of a tile.
        level0_mpp: um per level-0 px.
        patch_size_level0: T * target_mpp / level0_mpp, side of a tile in level-0 px, a fraction.
        shape: (rows, columns) of the whole grid, of which N tiles were kept.
        tissue: (N,) float64, share of each tile that is tissue; None where no mask was given.
    """

    coords: np.ndarray
    tile_size: int
    overlap: int
    target_mpp: float
    level0_mpp: float
    patch_size_level0: float
    shape: tuple[int, int]
    tissue: np.ndarray | None

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def step_level0(self) -> float:
        """From one tile's corner to the next one's, level-0 px, a fraction."""
        return (self.tile_size - self.overlap) * self.target_mpp / self.level0_mpp

    @property
    def cells(self) -> np.ndarray:
        """(N, 2) int64, (column, row) of each tile in the grid."""
        return np.rint(self.coords / self.step_level0).astype(np.int64)

    @property
    def delivered_mpp(self) -> float:
        """um per px of a tile that shows `patch_size_level0` px."""
        return self.patch_size_level0 * self.level0_mpp / self.tile_size

    @property
    def mpp_error(self) -> float:
        """Delivered less target mpp in um per px: 0, as fields of view are not rounded to pixels."""
        # A femtometre: what floating point leaves of numbers that are equal.
        return round(self.delivered_mpp - self.target_mpp, 9) + 0.0

    @property
    def upsampled(self) -> bool:
        """Whether tiles have more pixels than the slide (a finer mpp than it was scanned at was asked for)."""
        return is_enlarged(self.level0_mpp, self.target_mpp)


def make_grid(
    dimensions: tuple[int, int],
    level0_mpp: float,
    target_mpp: float,
    tile_size: int,
    overlap: int = 0,
    mask: TissueMask | None = None,
    min_tissue: float = 0.25,
) -> TileGrid:
    """Lay tiles over a slide, from its top-left corner, row by row.

    Every level-0 pixel lies in a tile, so the last row and column may reach beyond the slide (it reads as white there).
    Corners are rounded from exact multiples of the step: the grid does not drift.

    Args:
        dimensions: (width, height) of level 0, px.
        level0_mpp: um per level-0 px.
        target_mpp: um per px of a tile.
        tile_size: side of a tile, px at `target_mpp`.
        overlap: px at `target_mpp` that neighbours share.
        mask: where tissue is; without one all tiles are kept.
        min_tissue: the least share of a tile that must be tissue; 0 keeps all tiles.

    Returns:
        The grid; it holds no tile where there is no tissue.

    Raises:
        ValueError: a size, an mpp, the overlap or the share is impossible.
    """
    _check(dimensions, tile_size, overlap, min_tissue)
    scale = check_mpp(target_mpp, "mpp") / check_mpp(level0_mpp, "the slide's mpp")
    step, side = (tile_size - overlap) * scale, tile_size * scale
    if step < 1:
        raise ValueError(
            f"tiles would begin every {step:g} level-0 pixels; use a smaller overlap, larger tiles or a coarser mpp"
        )
    columns, rows = (max(math.ceil((size - overlap * scale - _SLIVER) / step), 1) for size in dimensions)
    xs, ys = (np.rint(np.arange(count) * step).astype(np.int64) for count in (columns, rows))
    share = None if mask is None else mask.share(xs, ys, side)
    kept = np.ones((rows, columns), bool) if share is None else share >= min_tissue
    row, column = np.nonzero(kept)
    coords = np.stack([xs[column], ys[row]], axis=1)
    tissue = None if share is None else share[kept]
    return TileGrid(
        coords, tile_size, overlap, float(target_mpp), float(level0_mpp), float(side), (rows, columns), tissue
    )


def _check(dimensions: tuple[int, int], tile_size: int, overlap: int, min_tissue: float) -> None:
    if min(dimensions) < 1:
        raise ValueError(f"the slide's dimensions are {dimensions}, expected 1 x 1 px or more")
    if tile_size < 1:
        raise ValueError(f"the tile size is {tile_size} px, expected 1 or more")
    if not 0 <= overlap < tile_size:
        raise ValueError(
            f"the overlap is {overlap} px and the tile size {tile_size} px; the overlap must be 0 or more and smaller "
            "than the tile size"
        )
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"the least share of tissue is {min_tissue}, expected a number from 0 to 1")
