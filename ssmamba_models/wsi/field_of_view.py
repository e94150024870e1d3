"""Which pixels of which level show a field of view, and how they become a tile: one resize of exactly that field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

# Pillow's bicubic widens its kernel when it shrinks (antialiasing), as the encoders' own transforms do. LANCZOS rings
# around dark nuclei, BOX shifts edges by up to half a pixel where the scale is not whole.
RESAMPLING = Image.Resampling.BICUBIC

# Scanners round the sizes of their levels, so that "4x" is 4.0001; such a level still serves a request for 4x.
_LEVEL_TOLERANCE = 1e-3

# A tile that differs by less than this from whole pixels of a level, over its whole width, is those pixels.
_PIXEL_TOLERANCE = 0.01


@dataclass(frozen=True)
class FieldOfView:
    """A rectangle of a slide and the level to read it from.

    Attributes:
        left, top: its corner, level-0 px (may be a fraction).
        level: the coarsest level that is as fine as asked for.
        downsample: that level's.
        level_width, level_height: its size in pixels of the level (a fraction unless `direct`).
        width, height: the size of the tile that shows it, px.
    """

    left: float
    top: float
    level: int
    downsample: float
    level_width: float
    level_height: float
    width: int
    height: int

    @property
    def direct(self) -> bool:
        """Whether a pixel of the tile is a pixel of the level, so that nothing is resampled."""
        return (self.level_width, self.level_height) == (self.width, self.height)

    @property
    def upsampled(self) -> bool:
        """Whether the tile has more pixels than the slide has there."""
        return self.level_width < self.width or self.level_height < self.height

    @property
    def level0_size(self) -> tuple[float, float]:
        """Width and height of what the tile shows, level-0 px."""
        return self.level_width * self.downsample, self.level_height * self.downsample


def find_field_of_view(
    downsamples: Sequence[float], left: float, top: float, width: int, height: int, scale: float
) -> FieldOfView:
    """Choose the level for a tile.

    Args:
        downsamples: of the slide's levels, finest first.
        left, top: the tile's corner, level-0 px.
        width, height: the tile's size, px.
        scale: level-0 px per px of the tile.

    Returns:
        What to read.
    """
    fine = [level for level, downsample in enumerate(downsamples) if downsample <= scale * (1 + _LEVEL_TOLERANCE)]
    level = max(fine, default=0, key=downsamples.__getitem__)
    downsample = downsamples[level]
    across, down = (_snapped(count * scale / downsample, count) for count in (width, height))
    return FieldOfView(left, top, level, downsample, across, down, width, height)


def _snapped(size: float, count: int) -> float:
    return float(count) if abs(size - count) < _PIXEL_TOLERANCE else size


def resize_field(image: Image.Image, offset: tuple[float, float], view: FieldOfView) -> Image.Image:
    """Make the tile from the pixels that hold its field of view.

    Args:
        image: pixels of the level, from at or before the field's corner to at or beyond its end.
        offset: where in the image the field begins, (x, y) px of the level.
        view: the field.

    Returns:
        The tile, of `view.width` x `view.height` px.
    """
    if view.direct and offset == (0, 0) and image.size == (view.width, view.height):
        return image
    right = min(offset[0] + view.level_width, image.width)
    bottom = min(offset[1] + view.level_height, image.height)
    return image.resize((view.width, view.height), RESAMPLING, box=(*offset, right, bottom))
