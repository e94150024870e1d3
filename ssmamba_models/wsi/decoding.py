"""What a decoding process does: prepare a slide (tissue, grid, pictures), and read some of its tiles.

Nothing here needs torch, so that such a process starts at once and stays small.
"""

from __future__ import annotations

import errno
import io
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ssmamba_models.notice import one_line
from ssmamba_models.wsi.contours import Contour, contours_geojson, tissue_contours, write_geojson
from ssmamba_models.wsi.drawing import draw_thumbnail, write_thumbnail
from ssmamba_models.wsi.errors import TileError
from ssmamba_models.wsi.grid import TileGrid, make_grid
from ssmamba_models.wsi.overview import Overview
from ssmamba_models.wsi.reader import Slide, open_slide
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.tissue import tissue_mask

# The longer side of a thumbnail, px, at most, and of a level or an overview at least that is taken for one.
_THUMBNAIL, _LEAST_THUMBNAIL = 1024, 640
# Decoded pixels that a process keeps for neighbouring tiles, and slides that it keeps open.
_CACHE_BYTES, _OPEN_SLIDES = 64 * 2**20, 2


class OutputError(OSError):
    """A job's folder cannot be written: what it holds stays, and nothing more can be done there."""

    @classmethod
    def of(cls, error: BaseException, path: str | os.PathLike) -> OutputError:
        """Say of an error in writing what it means for the job."""
        number, text = getattr(error, "errno", None), one_line(error)
        # HDF5 tells the number in its message only.
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "quota exceeded" in text
        cure = "make room" if full else "see that it can be written"
        return cls(
            f"cannot write {os.fspath(path)!r} ({'the disk is full' if full else text}); files that were finished are "
            f"whole: {cure} and run the same command again"
        )


@dataclass(frozen=True)
class PrepareTask:
    """Find a slide's tissue and tiles.

    Attributes:
        slide: the slide.
        mpp, tile_size, overlap, min_tissue: as `make_grid`.
        thumbnails, contours: folders for the pictures and outlines; None writes none.
    """

    slide: SlideFile
    mpp: float
    tile_size: int
    overlap: int
    min_tissue: float
    thumbnails: str | None = None
    contours: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A slide's tiles.

    Attributes:
        coords: (N, 2) int64, level-0 px.
        cells: (N, 2) int64, column and row in the slide's grid.
        patch_size_level0: side of a tile, level-0 px.
        dimensions: (width, height) of level 0, px.
        origin: where the scanned area begins, (x, y) in level-0 px (see `Slide.origin`).
        mpp, mpp_source, mpp_error: of level 0, where that comes from, delivered less target mpp of the tiles.
        tissue_share: of the slide's area.
        reader: the library that reads it.
    """

    coords: np.ndarray
    cells: np.ndarray
    patch_size_level0: float
    dimensions: tuple[int, int]
    origin: tuple[int, int]
    mpp: float
    mpp_source: str
    mpp_error: float
    tissue_share: float
    reader: str

    def facts(self) -> dict[str, float | str]:
        """For status and summary."""
        return {
            "tissue_share": self.tissue_share,
            "mpp": self.mpp,
            "mpp_source": self.mpp_source,
            "mpp_error": self.mpp_error,
        }


@dataclass(frozen=True)
class CountTask(PrepareTask):
    """Find a slide's tissue and tiles, and tell how many these are: those of thousands of slides fill the memory."""


@dataclass(frozen=True)
class Counted:
    """What became of a `CountTask`.

    Attributes:
        tiles: how many the slide has.
        mpp, mpp_source: of level 0, and where that comes from.
    """

    tiles: int
    mpp: float
    mpp_source: str


@dataclass(frozen=True)
class ReadTask:
    """Read some tiles of a slide.

    Attributes:
        slide: the slide.
        coords: (n, 2) int64, level-0 px.
        mpp, tile_size: of the tiles.
        size: side of what the model takes, px; tiles are resized where that is another.
        interpolation: how, in timm's words ("bicubic", ...).
    """

    slide: SlideFile
    coords: np.ndarray
    mpp: float
    tile_size: int
    size: int
    interpolation: str


@dataclass(frozen=True)
class Tiles:
    """What became of a `ReadTask`.

    Attributes:
        pixels: (n, size, size, 3) uint8; white where a tile cannot be read.
        bad: (place in n, reason) of those.
    """

    pixels: np.ndarray
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class CutTask(ReadTask):
    """Read some tiles of a slide as image files.

    Attributes:
        format: "png" or "jpeg".
        quality: of a JPEG, 1 to 100; None for PNG.
    """

    format: str
    quality: int | None


@dataclass(frozen=True)
class Cuts:
    """What became of a `CutTask`.

    Attributes:
        images: n image files; None where a tile cannot be read.
        bad: (place in n, reason) of those.
    """

    images: list[bytes | None]
    bad: list[tuple[int, str]]


Task = PrepareTask | ReadTask | CutTask
Answer = Prepared | Counted | Tiles | Cuts


class Decoder:
    """Performs tasks, and keeps the slides open that they name."""

    def __init__(self) -> None:
        self._slides: OrderedDict[SlideFile, Slide] = OrderedDict()

    def perform(self, task: Task) -> Answer:
        """Do what a task says.

        Raises:
            SlideError, OSError: the slide cannot be used.
            OutputError: pictures cannot be written.
        """
        slide = self._open(task.slide)
        if isinstance(task, PrepareTask):
            prepared = _prepare(slide, task)
            return _count(prepared) if isinstance(task, CountTask) else prepared
        return _cut(slide, task) if isinstance(task, CutTask) else _read(slide, task)

    def _open(self, file: SlideFile) -> Slide:
        if file not in self._slides:
            while len(self._slides) >= _OPEN_SLIDES:
                self._slides.popitem(last=False)[1].close()
            self._slides[file] = open_slide(file.path, file.mpp, cache_bytes=_CACHE_BYTES)
        self._slides.move_to_end(file)
        return self._slides[file]

    def close(self) -> None:
        """Close all slides."""
        while self._slides:
            self._slides.popitem()[1].close()


def _prepare(slide: Slide, task: PrepareTask) -> Prepared:
    overview = slide.overview()
    mask = tissue_mask(overview)
    grid = make_grid(slide.dimensions, slide.mpp, task.mpp, task.tile_size, task.overlap, mask, task.min_tissue)
    if task.thumbnails is not None and task.contours is not None:
        contours = tissue_contours(mask)
        try:
            folders = Path(task.thumbnails), Path(task.contours)
            _write_pictures(task.slide.name, *folders, slide, overview, contours, grid)
        except OSError as error:
            raise OutputError.of(error, task.thumbnails) from error
    return Prepared(
        coords=grid.coords,
        cells=grid.cells,
        patch_size_level0=grid.patch_size_level0,
        dimensions=slide.dimensions,
        origin=slide.origin,
        mpp=slide.mpp,
        mpp_source=slide.mpp_source,
        mpp_error=grid.mpp_error,
        tissue_share=float(mask.mask.mean()),
        reader=slide.backend,
    )


def _count(prepared: Prepared) -> Counted:
    return Counted(len(prepared.coords), prepared.mpp, prepared.mpp_source)


def _write_pictures(
    name: str,
    thumbnails: Path,
    outlines: Path,
    slide: Slide,
    overview: Overview,
    contours: list[Contour],
    grid: TileGrid,
) -> None:
    image, downsample = _thumbnail(slide, overview)
    write_thumbnail(thumbnails / f"{name}.png", draw_thumbnail(image, downsample, contours, grid), overwrite=True)
    write_thumbnail(outlines / f"{name}.png", draw_thumbnail(image, downsample, contours), overwrite=True)
    write_geojson(outlines / f"{name}.geojson", contours_geojson(contours, slide.origin), overwrite=True)


def _thumbnail(slide: Slide, overview: Overview) -> tuple[np.ndarray, float]:
    # What was read once is not read again, where it is large enough.
    height, width = overview.image.shape[:2]
    if max(height, width) < _LEAST_THUMBNAIL:
        try:
            return slide.thumbnail(_thumbnail_side(slide))
        except TileError:
            return overview.image, overview.downsample
    if max(height, width) <= _THUMBNAIL:
        return overview.image, overview.downsample
    shrink = max(height, width) / _THUMBNAIL
    size = (max(round(width / shrink), 1), max(round(height / shrink), 1))
    return np.asarray(Image.fromarray(overview.image).resize(size)), overview.downsample * shrink


def _thumbnail_side(slide: Slide) -> int:
    # A level as it is costs a small part of what shrinking the next finer one does.
    sides = [max(slide.dimensions) / downsample for downsample in slide.level_downsamples]
    return next((int(side) for side in sides if _LEAST_THUMBNAIL <= side <= _THUMBNAIL), _THUMBNAIL)


def _read(slide: Slide, task: ReadTask) -> Tiles:
    pixels = np.full((len(task.coords), task.size, task.size, 3), 255, np.uint8)
    bad = []
    for place, (x, y) in enumerate(task.coords.tolist()):
        try:
            tile = slide.read_region(x, y, task.tile_size, task.tile_size, task.mpp)
        except TileError as error:
            bad.append((place, error.reason))
            continue
        pixels[place] = tile if task.tile_size == task.size else _resize(tile, task)
    return Tiles(pixels, bad)


def _resize(tile: np.ndarray, task: ReadTask) -> np.ndarray:
    how = Image.Resampling[task.interpolation.upper()]
    return np.asarray(Image.fromarray(tile).resize((task.size, task.size), how))


def _cut(slide: Slide, task: CutTask) -> Cuts:
    tiles = _read(slide, task)
    bad = {place for place, _ in tiles.bad}
    images = [None if place in bad else _encode(tile, task) for place, tile in enumerate(tiles.pixels)]
    return Cuts(images, tiles.bad)


def _encode(tile: np.ndarray, task: CutTask) -> bytes:
    # Chroma at full resolution: the slide's own JPEG has other blocks than the tile's.
    options = {} if task.quality is None else {"quality": task.quality, "subsampling": 0}
    file = io.BytesIO()
    Image.fromarray(tile).save(file, task.format, **options)
    return file.getvalue()
