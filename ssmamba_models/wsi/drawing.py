"""A slide's thumbnail with the outline of its tissue and its tiles drawn on it."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from ssmamba_models.output import whole_file
from ssmamba_models.wsi.contours import TISSUE_COLOR, Contour
from ssmamba_models.wsi.grid import TileGrid

_TILE_COLOR = (30, 60, 160)


def draw_thumbnail(
    image: np.ndarray, downsample: float, contours: Iterable[Contour] = (), grid: TileGrid | None = None
) -> Image.Image:
    """Draw contours and tiles over a thumbnail.

    Args:
        image: (h, w, 3) uint8, what `Slide.thumbnail` gave.
        downsample: level-0 px per px of it.
        contours: what `tissue_contours` gave.
        grid: the tiles.

    Returns:
        The picture, RGB, of the thumbnail's size.
    """
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    if grid is not None:
        for left, top in grid.coords.tolist():
            draw.rectangle(_box(left, top, grid.patch_size_level0, downsample), outline=_TILE_COLOR)
    for contour in contours:
        for ring in contour.rings:
            draw.line([tuple(point) for point in (ring / downsample).tolist()], fill=TISSUE_COLOR, width=2)
    return picture


def _box(left: float, top: float, side: float, downsample: float) -> tuple[int, int, int, int]:
    # Neighbours share the line between them.
    x0, y0, x1, y1 = (round(edge / downsample) for edge in (left, top, left + side, top + side))
    return x0, y0, x1, y1


def write_thumbnail(path: str | os.PathLike, picture: Image.Image, overwrite: bool = False) -> None:
    """Write a picture whole or not at all; the suffix (.png, .jpg) says how.

    Args:
        path: the file; its folder must exist.
        picture: what `draw_thumbnail` gave.
        overwrite: replace an existing file.

    Raises:
        OSError: it cannot be written, or exists.
    """
    with whole_file(path, overwrite) as part:
        # PNG's usual 6 takes half as long again, and the first tiles wait for it; other formats ignore the level.
        picture.save(part, compress_level=1)
