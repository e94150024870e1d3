"""Slides through OpenSlide: SVS, NDPI, MIRAX, SCN, BIF, Philips, DICOM, tiled TIFF, ..."""

from __future__ import annotations

import contextlib
import os
import threading
from types import ModuleType
from typing import Any

from PIL import Image

from ssmamba_models.notice import one_line
from ssmamba_models.wsi.backend import BACKGROUND, whole_count, whole_start
from ssmamba_models.wsi.errors import NotASlideError, TileError
from ssmamba_models.wsi.mpp import PixelSize, pixel_size_from_resolution

_UNITS = {"inch": 2, "centimeter": 3}


def require_openslide() -> ModuleType:
    """Import OpenSlide, which only slides need.

    Raises:
        ImportError: it is missing, or its shared library is; the message names the extra that installs both.
    """
    try:
        import openslide
    # A missing libopenslide is an OSError on some systems and a ModuleNotFoundError on others.
    except (ImportError, OSError) as error:
        raise ImportError(
            f'reading slides needs OpenSlide ({one_line(error)}); install it with: pip install "ssmamba-models[wsi]"'
        ) from error
    return openslide


def openslide_knows(path: str | os.PathLike) -> bool:
    """Whether OpenSlide recognises a file's format."""
    openslide = require_openslide()
    try:
        return openslide.OpenSlide.detect_format(path) is not None
    except openslide.OpenSlideError:
        return False


class OpenSlideBackend:
    """A slide opened by OpenSlide (see `Backend`); threads may share it, processes may not.

    Args:
        path: the slide.
        cache_bytes: how many bytes of decoded tiles OpenSlide may keep.

    Attributes:
        vendor: whose format it is; "generic-tiff" for any tiled TIFF.

    Raises:
        NotASlideError: OpenSlide does not open it.
        ImportError: OpenSlide is missing.
    """

    name = "openslide"

    def __init__(self, path: str | os.PathLike, cache_bytes: int):
        self._openslide = require_openslide()
        self._path, self._cache_bytes = path, cache_bytes
        self._lock = threading.Lock()
        try:
            self._slide = self._open()
            self.level_dimensions = self._slide.level_dimensions
            self.level_downsamples = self._slide.level_downsamples
            properties = dict(self._slide.properties)
        except self._openslide.OpenSlideError as error:
            raise NotASlideError(f"OpenSlide cannot open {os.fspath(path)!r}: {one_line(error)}") from error
        self.pixel_sizes = _pixel_sizes(properties)
        x, y = _numbers(properties, "openslide.bounds-x", "openslide.bounds-y") or (0, 0)
        self.origin = (int(x), int(y))
        self.vendor = properties.get("openslide.vendor", "")

    def _open(self) -> Any:
        slide = self._openslide.OpenSlide(self._path)
        # OpenSlide before 4.0 has a cache of fixed size, which is slower and right.
        with contextlib.suppress(self._openslide.OpenSlideVersionError):
            slide.set_cache(self._openslide.OpenSlideCache(self._cache_bytes))
        return slide

    def read(
        self, level: int, left: float, top: float, width: float, height: float
    ) -> tuple[Image.Image, tuple[float, float]]:
        # OpenSlide takes level-0 pixels at every level, and shifts by a fraction of a level's pixel itself.
        (x, rest_x), (y, rest_y) = whole_start(left), whole_start(top)
        downsample = self.level_downsamples[level]
        offset = (rest_x / downsample, rest_y / downsample)
        size = (whole_count(offset[0], width), whole_count(offset[1], height))
        request = ((x, y), level, size)
        try:
            return _on_white(self._slide.read_region(*request)), offset
        except self._openslide.OpenSlideError:
            return _on_white(self._read_again(*request)), offset

    def _read_again(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        # After one error an OpenSlide handle answers every call with that error, so the place may be sound and
        # another thread have met the bad one: a handle that nobody else has yet tells. Old handles are not closed but
        # dropped, as other threads may still be reading from them.
        with self._lock:
            try:
                slide = self._open()
                region = slide.read_region(location, level, size)
                self._slide = slide
                return region
            # OSError: the file is gone.
            except (self._openslide.OpenSlideError, OSError) as error:
                with contextlib.suppress(self._openslide.OpenSlideError, OSError):
                    self._slide = self._open()
                raise TileError(*location, one_line(error)) from error

    def close(self) -> None:
        self._slide.close()


def _on_white(region: Image.Image) -> Image.Image:
    alpha = region.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return region.convert("RGB")
    flat = Image.new("RGB", region.size, BACKGROUND)
    flat.paste(region, mask=alpha)
    return flat


def _pixel_sizes(properties: dict[str, str]) -> list[PixelSize]:
    stated = (_numbers(properties, "openslide.mpp-x", "openslide.mpp-y"), _resolution(properties))
    sizes = [PixelSize(*stated[0], "openslide.mpp-x")] if stated[0] else []
    return sizes + ([stated[1]] if stated[1] else [])


def _resolution(properties: dict[str, str]) -> PixelSize | None:
    numbers = _numbers(properties, "tiff.XResolution", "tiff.YResolution")
    unit = _UNITS.get(properties.get("tiff.ResolutionUnit", ""), 1)
    return pixel_size_from_resolution(*numbers, unit, "tiff.XResolution") if numbers else None


def _numbers(properties: dict[str, str], *names: str) -> tuple[float, float] | None:
    try:
        x, y = (float(properties[name]) for name in names)
    except (KeyError, ValueError):
        return None
    return x, y
