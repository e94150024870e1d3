"""Slides as self-supervision reads them: the tiles of one, some of them where there are many, under seeded views."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ssmamba_models.data.bags import Bag, Bags
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

    noun, traits, counted = "slide", "names, numbers of tiles and bags, or provenance", "slides"

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
        """Of names, numbers of tiles and bags, and provenance."""
        counts = [bag.shared_bags for bag in self.bags.bags]
        return hashlib.sha256(f"{self.bags.sha256()} {counts}".encode()).hexdigest()

    def views(self, index: int, seed: int) -> dict[str, Any]:
        """The transform of a slide's tiles."""
        return self.transform(self.tiles(index, seed), torch.Generator().manual_seed(seed))

    def tiles(self, index: int, seed: int) -> SlideTiles:
        """The tiles of a slide, at most `max_tiles` of them."""
        bag = self.bags.bags[index]
        features, coords = self.reader.read(index, self.max_tiles, mixed_seed(seed, _SUBSAMPLE))
        check_finite(features.numpy(), bag.slide)
        return SlideTiles(features, _grid(bag, coords), SharedBags(self.reader, index) if bag.shared_bags else None)


class SharedBags(Sequence[tuple[Tensor, Tensor]]):
    """A slide's bags of shared augmentation, each read when it is asked for.

    Args:
        reader: reads them, and keeps what it may.
        place: of the slide.

    Index: a bag's number -> features (n, D) and grid (n, 2), float32 tensors.
    """

    def __init__(self, reader: BagReader, place: int):
        self.reader, self.place, self.bag = reader, place, reader.bags.bags[place]

    def __len__(self) -> int:
        return self.bag.shared_bags

    @overload
    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]: ...

    @overload
    def __getitem__(self, number: slice) -> list[tuple[Tensor, Tensor]]: ...

    def __getitem__(self, number: int | slice) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        features, coords = self.reader.read_shared(self.place, number)
        check_finite(features, self.bag.slide)
        return torch.from_numpy(features).float(), _grid(self.bag, torch.from_numpy(coords))


def _grid(bag: Bag, coords: Tensor) -> Tensor:
    """Level-0 pixels to tiles, from which coordinates of any size are exact in float32."""
    assert bag.patch_size_level0 is not None  # `open_bag` reads it
    return (coords.double() / bag.patch_size_level0).float()
