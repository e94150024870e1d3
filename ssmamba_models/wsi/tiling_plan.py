"""What every job over slides is told: which slides, how they are tiled, and what is done about bad ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ssmamba_models.wsi.mpp import check_mpp, read_mpp_csv
from ssmamba_models.wsi.slide_list import SlideFile, find_slides

# A tile of that side takes 0.8 GB.
LARGEST_TILE = 16384


@dataclass(frozen=True)
class TilingPlan:
    """How slides are tiled.

    Attributes:
        mpp: um per pixel of the tiles.
        tile_size: side of a tile, px at `mpp`.
        overlap: px at `mpp` that neighbours share.
        min_tissue: the least share of a tile that must be tissue.
        mpp_override: um per level-0 pixel of all slides, instead of what they say.
        mpp_csv: a table (slide,mpp) of the same for single slides; goes before `mpp_override`.
        max_bad_tiles: the share of a slide's tiles that may be unreadable; a slide with more fails.
        retry_failed: try failed slides again.
        workers: processes that read tiles; 0 reads in this one, None chooses by the machine.
        threads: CPU threads of the model, and the most `workers` that are chosen; None takes the cores that this
            process may use (see `threads.use_threads`).
        shard: (i, n): begin with the i-th share of the slides, from 1, then help the other shards.
    """

    mpp: float = 0.5
    tile_size: int = 224
    overlap: int = 0
    min_tissue: float = 0.25
    mpp_override: float | None = None
    mpp_csv: str | None = None
    max_bad_tiles: float = 0.05
    retry_failed: bool = False
    workers: int | None = None
    threads: int | None = None
    shard: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_mpp(self.mpp, "mpp")
        if self.mpp_override is not None:
            check_mpp(self.mpp_override, "mpp_override")
        if not 1 <= self.tile_size <= LARGEST_TILE:
            raise ValueError(f"tile_size is {self.tile_size} px, expected 1 to {LARGEST_TILE}")
        if not 0 <= self.overlap < self.tile_size:
            raise ValueError(
                f"the overlap is {self.overlap} px and the tile size {self.tile_size} px; the overlap must be 0 or "
                "more and smaller than the tile size"
            )
        for name in ("min_tissue", "max_bad_tiles"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share from 0 to 1")
        self._check_least(workers=0, threads=1)

    def _check_least(self, **least: int) -> None:
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not (value >= bound and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, expected {bound} or more")

    def slides(self, places: Any) -> list[SlideFile]:
        """The slides of these files and folders (see `find_slides`)."""
        table = None if self.mpp_csv is None else read_mpp_csv(self.mpp_csv)
        return find_slides(places, self.mpp_override, table)
