"""Slides through tifffile, block by block: OME-TIFF, plain and striped TIFF, and what else OpenSlide does not open."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import OrderedDict
from types import ModuleType

import numpy as np
from PIL import Image

from ssmamba_models.notice import one_line
from ssmamba_models.wsi.backend import BACKGROUND, whole_count, whole_start
from ssmamba_models.wsi.errors import NotASlideError, TileError, UnsupportedSlideError
from ssmamba_models.wsi.tiff_layout import (
    Plane,
    TiffLevel,
    check_samples,
    find_levels,
    find_pixel_sizes,
    find_series,
    samples_to_rgb,
)

# Half a gigabyte of RGB: a picture in one strip of more than that would fill the memory of a worker.
_MOST_BLOCK_PIXELS = 2**29 // 3


def require_tifffile() -> ModuleType:
    """Import tifffile, which only slides need.

    Raises:
        ImportError: it is missing or broken; the message names the extra that installs it.
    """
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(
            f'reading this slide needs tifffile ({error}); install it with: pip install "ssmamba-models[wsi]"'
        ) from error
    return tifffile


def is_ome_tiff(path: str | os.PathLike) -> bool:
    """Look at a TIFF file of no vendor's format, of which OpenSlide reads the pages as libtiff shows them.

    Args:
        path: the file.

    Returns:
        Whether it is an OME-TIFF, of which OpenSlide sees the first page only: neither channels on other pages, nor
        levels in sub-directories, nor the size of a pixel.

    Raises:
        UnsupportedSlideError: it shows no RGB or grey picture; OpenSlide would find that out at each tile.
    """
    tifffile = require_tifffile()
    try:
        with tifffile.TiffFile(path) as file:
            if not file.is_ome:
                check_samples(find_series(file))
            return file.is_ome
    except UnsupportedSlideError as error:
        raise UnsupportedSlideError(f"{os.fspath(path)!r} cannot be read as a slide: {error}") from error
    # What tifffile cannot make sense of, OpenSlide may.
    except Exception:
        return False


class TiffBackend:
    """A TIFF file opened by tifffile (see `Backend`); threads may share it, processes may not.

    Args:
        path: the slide.
        cache_bytes: how many bytes of decoded blocks may be kept.

    Raises:
        NotASlideError: tifffile does not open it.
        UnsupportedSlideError: it opens, but shows no RGB picture.
        ImportError: tifffile is missing.
    """

    name = "tifffile"
    origin = (0, 0)

    def __init__(self, path: str | os.PathLike, cache_bytes: int):
        tifffile = require_tifffile()
        # What tifffile finds odd it logs; what stops us is raised here.
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)
        self._path, self._lock = path, threading.Lock()
        self._cache = _BlockCache(cache_bytes)
        try:
            self._file = tifffile.TiffFile(path)
        # Broken headers make tifffile raise IndexError, struct.error and others.
        except Exception as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise NotASlideError(f"tifffile cannot open {os.fspath(path)!r}: {one_line(error)}") from error
        try:
            self._describe()
        except BaseException:
            self._file.close()
            raise

    def _describe(self) -> None:
        name = repr(os.fspath(self._path))
        try:
            series = find_series(self._file)
            self._levels = find_levels(series)
            self.pixel_sizes = find_pixel_sizes(self._file, series)
        except UnsupportedSlideError as error:
            raise UnsupportedSlideError(f"{name} cannot be read as a slide: {error}") from error
        # Broken directories make tifffile raise KeyError, IndexError, struct.error and others.
        except Exception as error:
            raise NotASlideError(f"tifffile cannot make sense of {name}: {one_line(error)}") from error
        self.level_dimensions = tuple((level.width, level.height) for level in self._levels)
        self.level_downsamples = tuple(_downsample(self.level_dimensions[0], size) for size in self.level_dimensions)
        if max(math.prod(level.block) for level in self._levels) > _MOST_BLOCK_PIXELS:
            raise UnsupportedSlideError(
                f"{name} is stored in pieces too large for memory ({self._levels[0].block} px); save it as a tiled "
                "TIFF (vips tiffsave --tile --pyramid)"
            )

    def read(
        self, level: int, left: float, top: float, width: float, height: float
    ) -> tuple[Image.Image, tuple[float, float]]:
        downsample = self.level_downsamples[level]
        (x, rest_x), (y, rest_y) = whole_start(left / downsample), whole_start(top / downsample)
        columns, rows = whole_count(rest_x, width), whole_count(rest_y, height)
        try:
            pixels = self._pixels(level, x, y, columns, rows)
        except MemoryError:
            raise
        # imagecodecs has an exception class for each codec, and broken data raise ValueError, struct.error, ... too.
        except Exception as error:
            raise TileError(left, top, one_line(error)) from error
        return Image.fromarray(pixels), (rest_x, rest_y)

    def _pixels(self, place: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        level = self._levels[place]
        canvas = np.full((height, width, 3), BACKGROUND, np.uint8)
        (left, right), (top, bottom) = _inside(x, width, level.width), _inside(y, height, level.height)
        wide, high = level.block
        for row in range(top // high, -(-bottom // high)) if top < bottom and left < right else ():
            for column in range(left // wide, -(-right // wide)):
                block = self._block(place, row, column)
                x0, y0 = max(left, column * wide), max(top, row * high)
                part = block[y0 - row * high : bottom - row * high, x0 - column * wide : right - column * wide]
                canvas[y0 - y : y0 - y + part.shape[0], x0 - x : x0 - x + part.shape[1]] = part
        return canvas

    def _block(self, place: int, row: int, column: int) -> np.ndarray:
        key = (place, row, column)
        block = self._cache.get(key)
        if block is None:
            block = self._decode_block(self._levels[place], row, column)
            self._cache.put(key, block)
        return block

    def _decode_block(self, level: TiffLevel, row: int, column: int) -> np.ndarray:
        across, down = (-(-size // block) for size, block in zip((level.width, level.height), level.block))
        parts = [self._decode(level, plane, (plane.index * down + row) * across + column) for plane in level.planes]
        written = [part for part in parts if part is not None]
        if len(written) < len(parts):
            wide, high = level.block
            return np.broadcast_to(np.array(BACKGROUND, np.uint8), (high, wide, 3))
        return samples_to_rgb(np.concatenate(written, axis=2), level.keyframe)

    def _decode(self, level: TiffLevel, plane: Plane, segment: int) -> np.ndarray | None:
        """The samples (h, w, channels) of a strip or tile; None where it was never written."""
        offset, count = plane.page.dataoffsets[segment], plane.page.databytecounts[segment]
        if count == 0:
            return None
        with self._lock:
            handle = self._file.filehandle
            handle.seek(offset)
            data = handle.read(count)
        if len(data) != count:
            raise OSError(f"only {len(data)} of {count} bytes of a tile could be read")
        keyframe = level.keyframe
        decoded, _, _ = keyframe.decode(data, segment, jpegtables=keyframe.jpegtables, jpegheader=keyframe.jpegheader)
        return decoded[0]

    def close(self) -> None:
        self._file.close()
        self._cache.clear()


def _downsample(full: tuple[int, int], size: tuple[int, int]) -> float:
    mean = (full[0] / size[0] + full[1] / size[1]) / 2
    whole = round(mean)
    # Sizes of levels are rounded (5555 px halved are 2777), the step between them is not.
    fits = all(abs(large / whole - small) < 1 for large, small in zip(full, size))
    return float(whole) if fits else mean


def _inside(start: int, length: int, limit: int) -> tuple[int, int]:
    return min(max(start, 0), limit), min(max(start + length, 0), limit)


class _BlockCache:
    """Decoded blocks, the least recently used forgotten first; threads may share it."""

    def __init__(self, most_bytes: int):
        self._most, self._bytes = most_bytes, 0
        self._blocks: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int, int]) -> np.ndarray | None:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def put(self, key: tuple[int, int, int], block: np.ndarray) -> None:
        with self._lock:
            if key in self._blocks:
                return
            self._blocks[key] = block
            self._bytes += block.nbytes
            # The newest stays whatever its size: a striped picture's strip is asked for again at once.
            while self._bytes > self._most and len(self._blocks) > 1:
                self._bytes -= self._blocks.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._bytes = 0
