"""Slides as a training sees them: tensors of their tiles, some of the tiles where there are many."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssmamba_models.data.bags import Bags


class BagReader:
    """Reads the tiles of slides, and keeps as many slides in memory as it may.

    Args:
        bags: the slides.
        cache_bytes: memory for whole slides, kept as they are stored (float16 takes half of float32).
    """

    def __init__(self, bags: Bags, cache_bytes: float):
        self.bags, self.free = bags, cache_bytes
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._kept_shared: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, place: int, max_tiles: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The tiles of the slide at a place.

        Args:
            place: in `bags`.
            max_tiles: a slide of more tiles shows so many, drawn without replacement, in their order.
            seed: draws them.

        Returns:
            features (n, D) float32 and coords (n, 2) int64.
        """
        bag = self.bags.bags[place]
        places = None
        if max_tiles is not None and bag.tiles > max_tiles:
            places = np.sort(np.random.default_rng(seed).choice(bag.tiles, max_tiles, replace=False))
        features, coords = self._tiles(place, places)
        return torch.from_numpy(features).float(), torch.from_numpy(coords)

    def _tiles(self, place: int, places: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        bag = self.bags.bags[place]
        if place not in self._kept:
            # At most as large as float32 would be.
            size = bag.tiles * (4 * self.bags.feature_dim + 16)
            if size > self.free:
                return bag.read(places)
            features, coords = bag.read()
            self.free -= features.nbytes + coords.nbytes
            self._kept[place] = features, coords
        features, coords = self._kept[place]
        return (features, coords) if places is None else (features[places], coords[places])

    def read_shared(self, place: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """One of a slide's bags of shared augmentation: features (n, D) as stored, coords (n, 2) int64."""
        if place not in self._kept_shared:
            bag = self.bags.bags[place]
            features, coords = bag.read_shared(number)
            size = bag.shared_bags * (features.nbytes + coords.nbytes)
            if size > self.free:
                return features, coords
            self.free -= size
            self._kept_shared[place] = bag.read_shared()
        features, coords = self._kept_shared[place]
        return features[number], coords[number]
