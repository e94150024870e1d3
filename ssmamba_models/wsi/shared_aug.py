"""Bags of shared augmentation: which tiles of a slide a bag has, how all of them are altered, and their features.

All is drawn from the seed, the slide's name and the bag's number, so that a job that was killed ends with the same
bytes, and one slide's bags do not depend on another's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from ssmamba_models.data.seeded import mixed_seed

# Random resized crop: shares of the area, and sides.
_AREA, _RATIO, _TRIES = (0.5, 1.0), (3 / 4, 4 / 3), 10
_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
_JITTER_CHANCE, _GRAY_CHANCE, _BLUR_CHANCE = 0.8, 0.2, 0.5
# Of the blur: sigma in pixels, and the kernel as a share of the tile.
_SIGMA, _KERNEL = (0.1, 2.0), 0.1


@dataclass(frozen=True)
class SharedAugmentation:
    """What is done to each tile of a bag.

    Attributes:
        crop: left, top, width and height of what stays of a tile and is enlarged to its size, as shares of it.
        jitter: (of what, factor) in the order in which they are applied; hue is shifted by its number.
        gray: whether colour goes.
        sigma: of a Gaussian blur, in pixels; None blurs nothing.

    Source: Lazard et al., Giga-SSL (arXiv:2212.03273); numbers as SimCLR (arXiv:2002.05709, appendix A), a larger least
    crop, and no flips.
    """

    crop: tuple[float, float, float, float]
    jitter: tuple[tuple[str, float], ...]
    gray: bool
    sigma: float | None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Alter tiles, (B, 3, S, S) float in 0..1 -> the same."""
        side = images.shape[-1]
        left, top, width, height = (round(share * side) for share in self.crop)
        # Rounding must not leave the tile.
        width, height = max(1, min(width, side - left)), max(1, min(height, side - top))
        images = transforms.resized_crop(
            images, top, left, height, width, [side, side], InterpolationMode.BILINEAR, antialias=True
        )
        for name, factor in self.jitter:
            images = getattr(transforms, f"adjust_{name}")(images, factor)
        if self.gray:
            # A copy: the three channels are one in memory, and the caller goes on in place.
            images = transforms.rgb_to_grayscale(images, num_output_channels=3).contiguous()
        if self.sigma is not None:
            kernel = 2 * int(side * _KERNEL / 2) + 1
            images = transforms.gaussian_blur(images, [kernel, kernel], [self.sigma, self.sigma])
        return images


def draw_augmentation(dice: np.random.Generator) -> SharedAugmentation:
    """One augmentation, for all tiles of a bag."""
    crop = _draw_crop(dice)
    factors = [
        (name, float(dice.uniform(-most, most)) + (0.0 if name == "hue" else 1.0)) for name, most in _JITTER.items()
    ]
    order = dice.permutation(len(factors))
    jitter = tuple(factors[place] for place in order) if dice.random() < _JITTER_CHANCE else ()
    gray = bool(dice.random() < _GRAY_CHANCE)
    sigma = float(dice.uniform(*_SIGMA))
    return SharedAugmentation(crop, jitter, gray, sigma if dice.random() < _BLUR_CHANCE else None)


def _draw_crop(dice: np.random.Generator) -> tuple[float, float, float, float]:
    low, high = map(math.log, _RATIO)
    for _ in range(_TRIES):
        area, ratio = dice.uniform(*_AREA), math.exp(dice.uniform(low, high))
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if max(width, height) <= 1:
            return float(dice.uniform(0, 1 - width)), float(dice.uniform(0, 1 - height)), width, height
    return 0.0, 0.0, 1.0, 1.0


@dataclass(frozen=True)
class Part:
    """Tiles of a slide that go through the model at once: of its grid, or of one of its bags.

    Attributes:
        coords: (n, 2) int64, level-0 px.
        rows: which rows of the grid, or of the bag, these are.
        last: whether nothing of the slide comes after them.
        bag: the number of the bag; None for the grid.
        augmentation: of the bag's tiles; None for the grid.
    """

    coords: np.ndarray
    rows: slice
    last: bool
    bag: int | None = None
    augmentation: SharedAugmentation | None = None


@dataclass(frozen=True)
class SharedAug:
    """The bags of a job.

    Attributes:
        bags: how many each slide has; 0 for none.
        tiles: of a bag.
        seed: of what is drawn.
    """

    bags: int
    tiles: int
    seed: int

    def parts(self, slide: str, coords: np.ndarray, batch_size: int) -> Iterator[Part]:
        """All that goes through the model of a slide: its grid, then its bags, cut at fixed places.

        Args:
            slide: its name.
            coords: (N, 2) of its grid, N 1 or more.
            batch_size: the most tiles of a part.
        """
        for rows in _cut(len(coords), batch_size):
            yield Part(coords[rows], rows, last=not self.bags and rows.stop == len(coords))
        for bag in range(self.bags):
            chosen, augmentation = self.draw(slide, bag, len(coords))
            for rows in _cut(self.tiles, batch_size):
                last = bag == self.bags - 1 and rows.stop == self.tiles
                yield Part(coords[chosen[rows]], rows, last, bag, augmentation)

    def draw(self, slide: str, bag: int, count: int) -> tuple[np.ndarray, SharedAugmentation]:
        """The places (n,) of a bag's tiles among the slide's, and what is done to them."""
        name = int.from_bytes(hashlib.blake2b(slide.encode(), digest_size=8).digest(), "little")
        dice = np.random.default_rng(mixed_seed(self.seed, name, bag))
        augmentation = draw_augmentation(dice)
        # Sorted, since neighbours are read faster one after the other; a bag has no order.
        return np.sort(dice.integers(count, size=self.tiles)), augmentation


def _cut(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class BagRows:
    """Collects the features of a bag, whose parts come in order.

    A tile that cannot be read is replaced by the next of the bag that can: as if that had been drawn twice.
    """

    def __init__(self) -> None:
        self._features: list[np.ndarray] = []
        self._coords: list[np.ndarray] = []
        self._good: list[np.ndarray] = []

    def add(self, part: Part, bad: list[int], features: np.ndarray) -> None:
        """Add a part: (n, D), the rows in `bad` of no account."""
        good = np.ones(len(part.coords), dtype=bool)
        good[bad] = False
        self._features.append(features)
        self._coords.append(part.coords)
        self._good.append(good)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D) and coords (n, 2) of the bag.

        Raises:
            ValueError: no tile of it can be read.
        """
        good = np.flatnonzero(np.concatenate(self._good))
        if len(good) == 0:
            raise ValueError("no tile of a bag of shared augmentation can be read")
        count = sum(map(len, self._good))
        chosen = good[np.searchsorted(good, np.arange(count)) % len(good)]
        return np.concatenate(self._features)[chosen], np.concatenate(self._coords)[chosen]
