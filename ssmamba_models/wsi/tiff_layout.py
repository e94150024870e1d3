"""Which of a TIFF file's pages are the slide's levels, and how their samples become 8-bit RGB."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ssmamba_models.wsi.backend import BACKGROUND
from ssmamba_models.wsi.errors import UnsupportedSlideError
from ssmamba_models.wsi.mpp import PixelSize, pixel_size_from_resolution

# TIFF 6.0, tag 262 (PhotometricInterpretation).
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _YCBCR = 0, 1, 2, 6
_JPEGS = {6, 7, 33007, 34892}
_LAYOUTS = ("YX", "YXS", "SYX", "CYX")
# TIFF 6.0, tag 338 (ExtraSamples).
_UNASSOCIATED_ALPHA = 2

# OME schema 2016-06, UnitsLength, in um.
_OME_UNITS = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "Å": 1e-4, "in": 25_400.0}
_APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.]+)")


@dataclass(frozen=True)
class Plane:
    """One or all channels of a level: a page, and which of its planes (0 unless its planes are stored apart)."""

    page: Any
    index: int


@dataclass(frozen=True)
class TiffLevel:
    """A level of the pyramid.

    Attributes:
        width, height: px.
        planes: where the channels lie: one for all of them, or one each.
        keyframe: the page that says how the others are stored.
    """

    width: int
    height: int
    planes: tuple[Plane, ...]
    keyframe: Any

    @property
    def block(self) -> tuple[int, int]:
        """Width and height of the pieces that are decoded at once, px."""
        page = self.keyframe
        if page.is_tiled:
            return page.tilewidth, page.tilelength
        return self.width, min(page.rowsperstrip, self.height)


def find_series(file: Any) -> Any:
    """The series of a tifffile.TiffFile with the largest image (labels and macro photographs are smaller)."""
    series = [one for one in file.series if "Y" in one.axes and "X" in one.axes]
    if not series:
        raise UnsupportedSlideError("it holds no image")
    return max(series, key=lambda one: one.shape[one.axes.index("Y")] * one.shape[one.axes.index("X")])


def find_levels(series: Any) -> tuple[TiffLevel, ...]:
    """The levels of a series.

    Args:
        series: a tifffile.TiffPageSeries.

    Returns:
        The levels, finest first.

    Raises:
        UnsupportedSlideError: the series is no RGB or grey picture of 8 to 16 bits.
    """
    check_samples(series)
    _check_colors(series.keyframe)
    levels = [_level(level) for level in series.levels if level.axes == series.axes]
    return tuple(sorted(levels, key=lambda level: -level.width))


def check_samples(series: Any) -> None:
    """Make sure that a series shows one picture in RGB or grey, of 8 or 16 bits.

    Raises:
        UnsupportedSlideError: it is a stack, has other channels, or numbers without a defined white.
    """
    page = series.keyframe
    if series.axes not in _LAYOUTS:
        raise UnsupportedSlideError(
            f"its images are stacked (axes {series.axes}, shape {series.shape}); save the one to read by itself"
        )
    channels = series.shape[-1] if series.axes == "YXS" else series.shape[0] if len(series.axes) == 3 else 1
    if channels not in (1, 3, 4):
        raise UnsupportedSlideError(f"it has {channels} channels, expected RGB, RGBA or grey; save an RGB rendering")
    if series.dtype not in (np.uint8, np.uint16):
        raise UnsupportedSlideError(f"its samples are {series.dtype}, which has no defined white; save 8 or 16 bits")
    if page.photometric != _RGB and (channels == 4 or (series.axes == "CYX" and series.dtype != np.uint8)):
        kind = "four" if channels == 4 else "16-bit"
        raise UnsupportedSlideError(f"its {kind} channels are no RGB (fluorescence?); save an RGB rendering")


def _check_colors(page: Any) -> None:
    decoded_to_rgb = page.photometric == _YCBCR and page.compression in _JPEGS
    if page.photometric not in (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB) and not decoded_to_rgb:
        raise UnsupportedSlideError(f"its colours are stored as {page.photometric!s}; save it as RGB")


def _level(level: Any) -> TiffLevel:
    planes = [
        Plane(page, index)
        for page in level.pages
        for index in range(level.keyframe.samplesperpixel if level.keyframe.planarconfig == 2 else 1)
    ]
    apart = level.shape[0] if level.axes in ("SYX", "CYX") else 1
    if any(plane.page is None for plane in planes) or len(planes) != apart:
        raise UnsupportedSlideError(f"its channels are not all listed in its directory (axes {level.axes})")
    width, height = (level.shape[level.axes.index(axis)] for axis in "XY")
    return TiffLevel(width, height, tuple(planes), level.keyframe)


def samples_to_rgb(samples: np.ndarray, page: Any) -> np.ndarray:
    """Turn stored samples into colours.

    Args:
        samples: (h, w, channels) uint8 or uint16, of 1, 3 or 4 channels.
        page: the page that they come from.

    Returns:
        (h, w, 3) uint8. 16 bits are scaled by their full range, transparent pixels are white.
    """
    if samples.dtype != np.uint8:
        full = 2 ** min(int(page.bitspersample), 16) - 1
        samples = (samples * (255.0 / full) + 0.5).astype(np.uint8)
    if samples.shape[2] == 4:
        # What is not specified counts as associated, as in libtiff.
        samples = _on_white(samples, _UNASSOCIATED_ALPHA not in page.extrasamples)
    if page.photometric == _MIN_IS_WHITE:
        samples = 255 - samples
    return np.ascontiguousarray(np.broadcast_to(samples, (*samples.shape[:2], 3)))


def _on_white(samples: np.ndarray, associated: bool) -> np.ndarray:
    colours, alpha = samples[:, :, :3].astype(np.uint16), samples[:, :, 3:].astype(np.uint16)
    glass = BACKGROUND[0] - alpha
    if associated:  # the colours are multiplied by alpha already
        return np.minimum(colours + glass, 255).astype(np.uint8)
    return ((colours * alpha + 255 * glass + 127) // 255).astype(np.uint8)


def find_pixel_sizes(file: Any, series: Any) -> list[PixelSize]:
    """What OME metadata, Aperio's description and the resolution tags say of level-0 pixels, in this order."""
    page = series.keyframe
    stated = [_ome_pixel_size(file, series), _aperio_pixel_size(page), _tag_pixel_size(page)]
    return [size for size in stated if size is not None]


def _ome_pixel_size(file: Any, series: Any) -> PixelSize | None:
    if not file.is_ome or not file.ome_metadata:
        return None
    try:
        root = ElementTree.fromstring(file.ome_metadata.encode())
    except ElementTree.ParseError:
        return None
    pixels = [element for element in root.iter() if element.tag.rsplit("}", 1)[-1] == "Pixels"]
    place = file.series.index(series)
    if place >= len(pixels):
        return None
    try:
        x, y = (_ome_length(pixels[place].attrib, axis) for axis in "XY")
    except (KeyError, ValueError):
        return None
    return PixelSize(x, y, "ome.PhysicalSizeX")


def _ome_length(attributes: dict[str, str], axis: str) -> float:
    unit = attributes.get(f"PhysicalSize{axis}Unit", "µm")
    return float(attributes[f"PhysicalSize{axis}"]) * _OME_UNITS[unit]


def _aperio_pixel_size(page: Any) -> PixelSize | None:
    found = _APERIO_MPP.search(page.description) if page.description.startswith("Aperio") else None
    return PixelSize(float(found[1]), float(found[1]), "aperio.MPP") if found else None


def _tag_pixel_size(page: Any) -> PixelSize | None:
    if not all(tag in page.tags for tag in (282, 283)):
        return None
    (x, below_x), (y, below_y) = page.tags[282].value, page.tags[283].value
    if not (below_x and below_y):
        return None
    return pixel_size_from_resolution(x / below_x, y / below_y, int(page.resolutionunit), "tiff.XResolution")
