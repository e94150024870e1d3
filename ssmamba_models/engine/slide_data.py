"""Slides as self-supervision reads them: the tiles of one, some of them where there are many, under seeded views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ssmamba_models.data.bags import Bags
from ssmamba_models.data.seeded import SeededData, mixed_seed
from ssmamba_models.data.slide_bags import check_finite
from ssmamba_models.engine.mil_data import BagReader
from ssmamba_models.slide.slide_tiles import SlideTiles

_SUBSAMPLE = 1  # the part of a seed that draws tiles, apart from what draws views


class SeededSlides(SeededData):
    """Slides under random views; an unreadable one is replaced by the next, as unreadable tiles are.

    Args:
        bags: the slides.
        transform: (SlideTiles, torch.Generator) -> dict of tensors; draws from that generator alone.
        seed: of the views, and of the tiles that they see.
        max_tiles: a slide of more tiles shows so many, drawn anew each time; None shows all.
        cache_bytes: memory (of each process that reads) for whole slides, so that they are read once.
    """

    noun, traits = "slide", "names, numbers of tiles or provenance"

    def __init__(
        self,
        bags: Bags,
        transform: Callable[[SlideTiles, torch.Generator], dict[str, Any]],
        seed: int,
        max_tiles: int | None = None,
        cache_bytes: float = 0,
    ):
        super().__init__(seed, str(bags.folder))
        self.bags, self.transform, self.max_tiles = bags, transform, max_tiles
        self.reader = BagReader(bags, cache_bytes)

    def __len__(self) -> int:
        return len(self.bags)

    def name(self, index: int) -> str:
        """The slide's name."""
        return self.bags.bags[index].slide

    def sha256(self) -> str:
        """Of names, numbers of tiles and provenance."""
        return self.bags.sha256()

    def views(self, index: int, seed: int) -> dict[str, Any]:
        """The transform of a slide's tiles."""
        return self.transform(self.tiles(index, seed), torch.Generator().manual_seed(seed))

    def tiles(self, index: int, seed: int) -> SlideTiles:
        """The tiles of a slide, at most `max_tiles` of them."""
        bag = self.bags.bags[index]
        features, coords = self.reader.read(index, self.max_tiles, mixed_seed(seed, _SUBSAMPLE))
        check_finite(features.numpy(), bag.slide)
        return SlideTiles(features, (coords / bag.patch_size_level0).float())
