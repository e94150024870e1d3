"""What every library that opens slides gives to `Slide`, and the geometry that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from ssmamba_models.wsi.mpp import PixelSize

# Beyond a slide's edge, and where a scanner stored nothing, there is glass.
BACKGROUND = (255, 255, 255)

# Below this a fraction of a pixel is rounding of floating point, and no further pixel is read for it.
_WHOLE = 1e-3


class Backend(Protocol):
    """An open slide.

    Attributes:
        name: the library.
        level_dimensions: (width, height) of each level, px, finest first.
        level_downsamples: level-0 px per px of each level.
        pixel_sizes: what the file says of its pixels' size, most trusted first.
        origin: where the scanned area begins, (x, y) in level-0 px; (0, 0) where the file does not say.
    """

    name: str
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    pixel_sizes: Sequence[PixelSize]
    origin: tuple[int, int]

    def read(
        self, level: int, left: float, top: float, width: float, height: float
    ) -> tuple[Image.Image, tuple[float, float]]:
        """Read the whole pixels of a level that hold a field of view.

        Args:
            level: the level.
            left, top: the field's corner, level-0 px.
            width, height: its size, px of the level.

        Returns:
            An RGB image, white beyond the slide's edge, and where in it the field begins, (x, y) px.

        Raises:
            TileError: the pixels cannot be decoded; the next read works.
        """

    def close(self) -> None:
        """Let go of the file."""


def whole_start(position: float) -> tuple[int, float]:
    """The pixel in which a position lies, and how far in it (0 where it is rounding only)."""
    start = math.floor(position + _WHOLE)
    return start, max(position - start, 0.0) if position - start > _WHOLE else 0.0


def whole_count(offset: float, size: float) -> int:
    """How many pixels hold a field that begins `offset` px into the first and is `size` px long."""
    return max(math.ceil(offset + size - _WHOLE), 1)


def crop_white(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    """A rectangle of an RGB image, white where it leaves it."""
    right, bottom = left + width, top + height
    if left >= 0 and top >= 0 and right <= image.width and bottom <= image.height:
        return image.crop((left, top, right, bottom))
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    if inside[0] < inside[2] and inside[1] < inside[3]:
        canvas.paste(image.crop(inside), (inside[0] - left, inside[1] - top))
    return canvas
