"""Slides whose pixels are known, good and bad, written with tifffile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

tifffile = pytest.importorskip("tifffile", reason="slides need the [wsi] extra")

# (w,) and (h,) level-0 positions of pixel centres -> (h, w, 3) uint8.
Content = Callable[[np.ndarray, np.ndarray], np.ndarray]

PINK, GLASS = (200, 120, 170), (244, 243, 244)


def blank(xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Glass without tissue."""
    return np.broadcast_to(np.array(GLASS, np.uint8), (len(ys), len(xs), 3))


def waves(xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Colours that differ at every place and change slowly."""
    x, y = xs[None, :] / 37.0, ys[:, None] / 29.0
    channels = np.sin(x) * np.cos(y), np.sin(x * 0.7 + 1) * np.sin(y * 0.9), np.cos(0.3 * x + 0.5 * y)
    return np.stack([127.5 + 100 * channel for channel in channels], axis=2).astype(np.uint8)


def tissue(xs: np.ndarray, ys: np.ndarray, period: float = 2000.0, radius: float = 0.35) -> np.ndarray:
    """A pink, structured disc in the middle of every square of `period` px, on glass."""
    x, y = (np.mod(at, period) / period - 0.5 for at in (xs[None, :], ys[:, None]))
    inside = (x**2 + y**2 < radius**2)[:, :, None]
    grain = (20 * np.sin(xs[None, :] / 5.0) * np.sin(ys[:, None] / 7.0))[:, :, None]
    return np.where(inside, np.array(PINK) + grain, np.array(GLASS)).astype(np.uint8)


def pixels(content: Content, size: tuple[int, int], downsample: int = 1) -> np.ndarray:
    """A whole level, (h, w, 3) uint8."""
    return _content(content, 0, 0, size[0] // downsample, size[1] // downsample, downsample)


def _content(content: Content, x: int, y: int, width: int, height: int, downsample: int) -> np.ndarray:
    xs, ys = ((start + np.arange(count) + 0.5) * downsample for start, count in ((x, width), (y, height)))
    return content(xs, ys)


def make_pyramid(
    path: Path,
    size: tuple[int, int],
    mpp: float | tuple[float, float] | None = None,
    levels: Sequence[int] = (1, 4),
    tile: int = 256,
    compression: str | None = "deflate",
    content: Content = tissue,
    missing: Collection[tuple[int, int]] = (),
    bigtiff: bool = False,
    byteorder: str = "<",
    **options,
) -> Path:
    """Write a tiled pyramid that OpenSlide reads as a generic TIFF.

    Args:
        path: the file.
        size: (width, height) of level 0, px.
        mpp: written as a resolution per centimetre; None writes none.
        levels: downsample of each.
        tile: side of the TIFF's tiles, px.
        compression: as tifffile's.
        content: what a pixel shows; a level's pixel shows what lies at its centre.
        missing: (row, column) of level-0 TIFF tiles that are left out.
        bigtiff, byteorder: of the file.
        options: more arguments of tifffile's `write`.

    Returns:
        The path.
    """
    if mpp is not None:
        x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
        options |= {"resolution": (10_000 / x, 10_000 / y), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder) as writer:
        for downsample in levels:
            shape = (size[1] // downsample, size[0] // downsample, 3)
            writer.write(
                _tiles(content, shape, tile, downsample, missing if downsample == 1 else ()),
                shape=shape,
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="rgb",
                compression=compression,
                subfiletype=int(downsample != 1),
                metadata=None,
                **options,
            )
    return path


def _tiles(
    content: Content, shape: tuple[int, int, int], tile: int, downsample: int, missing: Collection[tuple[int, int]]
) -> Iterator[np.ndarray | None]:
    for row in range(-(-shape[0] // tile)):
        for column in range(-(-shape[1] // tile)):
            if (row, column) in missing:
                yield None
            else:
                yield _content(content, column * tile, row * tile, tile, tile, downsample)


_SCN = """<?xml version="1.0"?>
<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection sizeX="{}" sizeY="{}"><image>
<pixels sizeX="{}" sizeY="{}"><dimension sizeX="{}" sizeY="{}" r="0" ifd="0"/></pixels>
<view offsetX="{}" offsetY="{}" sizeX="{}" sizeY="{}"/>
<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>
<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings>
</image></collection></scn>"""


def make_scn(path: Path, size: tuple[int, int], origin: tuple[int, int], mpp: float, content: Content = tissue) -> Path:
    """Write a Leica slide whose scanned area begins at `origin` and ends with the slide; places as `make_pyramid`'s.

    `content` is asked for places in the scanned area.
    """
    nanometres = round(1000 * mpp)
    area = size[0] - origin[0], size[1] - origin[1]
    lengths = [nanometres * length for length in (*size, *origin, *area)]
    xml = _SCN.format(*lengths[:2], *area, *area, *lengths[2:])
    return make_pyramid(path, area, mpp, levels=(1,), content=content, compression="jpeg", description=xml)


def truncate(path: Path, share: float = 0.5) -> Path:
    """Cut a file off, as a copy that stopped."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def corrupt_tile(path: Path, index: int, page: int = 0) -> Path:
    """Overwrite one of a page's compressed tiles with bytes that no decoder takes."""
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[page].dataoffsets[index], file.pages[page].databytecounts[index]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = b"\xff" * count
    path.write_bytes(data)
    return path


def make_not_a_slide(path: Path) -> Path:
    """Write text, whatever the suffix says."""
    path.write_text("this is no slide, " * 100)
    return path


def make_empty_file(path: Path) -> Path:
    """Write a file of zero bytes."""
    path.write_bytes(b"")
    return path
