"""A small picture of a whole slide, made in pieces so that memory stays bounded even without a pyramid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ssmamba_models.wsi.errors import TileError

# Pixels of a level that one piece may need, per side: 12 MB as RGB.
_PIECE = 2048

# A piece that cannot be read is quartered until the loss is this small, and no longer than for so many failures:
# each costs a re-opening, and a slide full of holes must not cost an hour.
_SMALLEST_PIECE, _MOST_FAILURES = 256, 100


@dataclass(frozen=True)
class Overview:
    """A slide seen from afar.

    Attributes:
        image: (h, w, 3) uint8 RGB, of the whole slide; white beyond its edge and where it cannot be read.
        downsample: level-0 px per px of the image, exact; pixel (0, 0) begins at level-0 pixel (0, 0).
        mpp: um per px of the image.
        unreadable: (h, w) bool, what could not be read.
    """

    image: np.ndarray
    downsample: float
    mpp: float
    unreadable: np.ndarray


def read_overview(
    dimensions: tuple[int, int],
    level0_mpp: float,
    downsample: float,
    level_downsample: float,
    read: Callable[[float, float, int, int], np.ndarray],
) -> Overview:
    """Put an overview together.

    Args:
        dimensions: (width, height) of level 0.
        level0_mpp: um per level-0 px.
        downsample: level-0 px per px of the overview.
        level_downsample: that of the level it is read from.
        read: gives (h, w, 3) for a corner (level-0 px) and a size (px of the overview).

    Returns:
        The overview.
    """
    width, height = (max(math.ceil(size / downsample - 1e-6), 1) for size in dimensions)
    image = np.full((height, width, 3), 255, np.uint8)
    unreadable = np.zeros((height, width), bool)
    per_pixel = downsample / level_downsample
    side = max(int(_PIECE / per_pixel), 1)
    smallest = max(int(_SMALLEST_PIECE / per_pixel), 1)
    pieces, failures = list(_pieces(0, 0, width, height, side)), 0
    while pieces:
        x, y, wide, high = pieces.pop()
        try:
            image[y : y + high, x : x + wide] = read(x * downsample, y * downsample, wide, high)
        except TileError:
            failures += 1
            if max(wide, high) > smallest and failures < _MOST_FAILURES:
                pieces.extend(_pieces(x, y, wide, high, -(-max(wide, high) // 2)))
            else:
                unreadable[y : y + high, x : x + wide] = True
    return Overview(image, downsample, downsample * level0_mpp, unreadable)


def _pieces(x: int, y: int, width: int, height: int, side: int) -> Iterator[tuple[int, int, int, int]]:
    for top in range(y, y + height, side):
        for left in range(x, x + width, side):
            yield left, top, min(side, x + width - left), min(side, y + height - top)
