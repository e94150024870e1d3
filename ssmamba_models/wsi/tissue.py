"""Where on a slide tissue is: coloured areas at low magnification.

Saturation of HSV and Otsu's threshold (Otsu, IEEE Trans. SMC 1979), kept within bounds so that a slide without glass or
without tissue, which has one kind of pixel only, is not split in two.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ssmamba_models.wsi.overview import Overview

if TYPE_CHECKING:
    from ssmamba_models.wsi.reader import Slide

# Saturations (0 to 1). Glass stays below the first, stained tissue seldom lies below the second.
_FAINTEST, _CLEAR = 0.04, 0.12

# Two kinds of pixels whose mean saturations are nearer than this are one kind.
_ONE_KIND = 0.05

# Brightness below which nothing is tissue: the black of a scanner's border, a felt pen, a cover slip's edge.
_BLACK = 0.2

# Ink: no stain is green, and none as strongly blue as a pen.
_GREEN_HUES, _GREEN_INK = (75, 185), 0.2
_BLUE_HUES, _BLUE_INK = (185, 250), 0.75

# In um, so that the mask does not depend on the overview's resolution.
_MEDIAN, _CLOSING = 24.0, 56.0
_SMALLEST_OBJECT, _LARGEST_HOLE = 150.0**2, 300.0**2
# Nor is a larger share of the whole image small: a field of view of 100 um is no dirt.
_LARGEST_SHARE = 0.25


@dataclass(frozen=True)
class TissueMask:
    """Where tissue is.

    Attributes:
        mask: (h, w) bool.
        downsample: level-0 px per px of the mask.
    """

    mask: np.ndarray
    downsample: float

    def share(self, xs: np.ndarray, ys: np.ndarray, side: float) -> np.ndarray:
        """The share of tissue in each tile of a grid, exact to the fraction of a mask pixel.

        Args:
            xs: (C,) left edges of the grid's columns, level-0 px.
            ys: (R,) top edges of its rows.
            side: of a tile, level-0 px.

        Returns:
            (R, C) float64, from 0 to 1; what lies beyond the slide is no tissue.
        """
        table = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1), np.int32)
        np.cumsum(self.mask, axis=0, dtype=np.int32, out=table[1:, 1:])
        np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
        edges = (np.asarray(at, float)[:, None] + (0.0, side) for at in (ys, xs))
        rows, columns = (np.ravel(edge) / self.downsample for edge in edges)
        sums = _interpolate(_interpolate(table, rows).T, columns).T.reshape(len(ys), 2, len(xs), 2)
        area = sums[:, 1, :, 1] - sums[:, 0, :, 1] - sums[:, 1, :, 0] + sums[:, 0, :, 0]
        return np.clip(area / (side / self.downsample) ** 2, 0.0, 1.0)


def _interpolate(table: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rows of a summed-area table at fractional places: linear between whole ones, as pixels are flat."""
    places = np.clip(places, 0, len(table) - 1)
    below = np.minimum(places.astype(np.int64), len(table) - 2)
    part = (places - below)[:, None]
    return table[below] * (1 - part) + table[below + 1] * part


def tissue_mask(slide: Slide | Overview) -> TissueMask:
    """Find tissue.

    Args:
        slide: an open slide, or what its method `overview` gave.

    Returns:
        The mask; empty for a slide of glass. What cannot be read counts as tissue, so that it is tried, and reported,
        tile by tile.

    Raises:
        ImportError: scipy is missing.
    """
    overview = slide if isinstance(slide, Overview) else slide.overview()
    if overview.unreadable.all():
        return TissueMask(overview.unreadable, overview.downsample)
    mask = _tidy(_stained(overview.image, ~overview.unreadable), overview.mpp)
    return TissueMask(mask | overview.unreadable, overview.downsample)


def _stained(image: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """(h, w) bool: pixels with the colour of tissue."""
    value = image.max(axis=2)
    chroma = value - image.min(axis=2)
    saturation = np.zeros(value.shape, np.uint8)
    np.divide(chroma * np.uint16(255), value, out=saturation, where=value > 0, casting="unsafe")
    candidates = readable & (value >= _BLACK * 255) & ~_ink(image, saturation)
    levels = np.bincount(saturation[candidates], minlength=256)
    return candidates & (saturation > _threshold(levels) * 255)


def _threshold(levels: np.ndarray) -> float:
    """The saturation (0 to 1) above which a pixel is tissue, from the histogram of all 256 levels."""
    if not levels.any():
        return 1.0
    place, below, above = _otsu(levels)
    mean = float(np.average(np.arange(256), weights=levels)) / 255
    if above - below < _ONE_KIND:
        return 0.0 if mean > _CLEAR else 1.0
    return min(max(place, _FAINTEST), _CLEAR)


def _otsu(levels: np.ndarray) -> tuple[float, float, float]:
    """Otsu's threshold and the means of the two sides, all from 0 to 1; the means are equal for one level only."""
    grey = np.arange(256)
    weight, total = np.cumsum(levels), np.cumsum(levels * grey)
    inside = (weight > 0) & (weight < weight[-1])
    if not inside.any():
        mean = total[-1] / weight[-1] / 255
        return mean, mean, mean
    low = total[inside] / weight[inside]
    high = (total[-1] - total[inside]) / (weight[-1] - weight[inside])
    best = int(np.argmax(weight[inside] * (weight[-1] - weight[inside]) * (high - low) ** 2))
    return grey[inside][best] / 255, low[best] / 255, high[best] / 255


def _ink(image: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """(h, w) bool: green and strongly blue pixels."""
    red, green, blue = (image[:, :, channel].astype(np.int16) for channel in range(3))
    top = np.maximum(np.maximum(red, green), blue)
    chroma = np.maximum(top - np.minimum(np.minimum(red, green), blue), 1).astype(np.float32)
    hue = np.where(top == green, 120 + 60 * (blue - red) / chroma, 240 + 60 * (red - green) / chroma)
    # Where red is strongest there is no such ink, whatever the formula above gives there.
    cold = top > red
    is_green = _within(hue, _GREEN_HUES) & (saturation > _GREEN_INK * 255)
    is_blue = _within(hue, _BLUE_HUES) & (saturation > _BLUE_INK * 255)
    return cold & (is_green | is_blue)


def _within(hue: np.ndarray, bounds: tuple[int, int]) -> np.ndarray:
    return (hue >= bounds[0]) & (hue < bounds[1])


def _tidy(mask: np.ndarray, mpp: float) -> np.ndarray:
    """Median filter, closing, filling of small holes, removal of small objects."""
    ndimage = _require_ndimage()
    # The median of zeros and ones is what more than half of them are.
    mask = ndimage.uniform_filter(mask.astype(np.float32), _odd(_MEDIAN / mpp), mode="nearest") > 0.5
    side = _odd(_CLOSING / mpp)
    closed = ndimage.minimum_filter(ndimage.maximum_filter(mask, side), side)
    largest = _LARGEST_SHARE * mask.size
    filled = ~_without_small(ndimage, ~closed, min(_LARGEST_HOLE / mpp**2, largest))
    return _without_small(ndimage, filled, min(_SMALLEST_OBJECT / mpp**2, largest))


def _odd(size: float) -> int:
    return 2 * int(size / 2) + 1


def _without_small(ndimage: ModuleType, mask: np.ndarray, area: float) -> np.ndarray:
    """The mask without connected areas of fewer pixels than this."""
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= area
    large[0] = False
    return large[labels]


def _require_ndimage() -> ModuleType:
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError(f'finding tissue needs scipy ({error}): pip install "ssmamba-models[wsi]"') from error
    return ndimage
