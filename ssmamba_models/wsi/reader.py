"""One way to read any slide: tiles at the exact mpp asked for, whatever library opens the file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import TracebackType

import numpy as np

from ssmamba_models.data.slide_table import slide_name
from ssmamba_models.data.tile_geometry import is_enlarged
from ssmamba_models.wsi.backend import Backend
from ssmamba_models.wsi.companions import what_is_missing
from ssmamba_models.wsi.errors import EmptySlideError, NotASlideError
from ssmamba_models.wsi.field_of_view import FieldOfView, find_field_of_view, resize_field
from ssmamba_models.wsi.image_backend import ImageBackend
from ssmamba_models.wsi.mpp import check_mpp, choose_mpp
from ssmamba_models.wsi.openslide_backend import OpenSlideBackend, openslide_knows
from ssmamba_models.wsi.overview import Overview, read_overview
from ssmamba_models.wsi.tiff_backend import TiffBackend, is_ome_tiff
from ssmamba_models.wsi.truncation import check_not_truncated, is_tiff

BACKENDS = ("openslide", "tifffile", "pil")

_OVERVIEW_MPP, _OVERVIEW_PIXELS = 8.0, 2**24
_CACHE_BYTES = 128 * 2**20


class Slide:
    """An open whole slide (see `open_slide`); close it, or use it in a `with` block.

    Threads may share one, processes may not: open the slide in each.

    Attributes:
        path: its file.
        name: the file's name without suffix.
        mpp: um per level-0 pixel.
        mpp_source: where that comes from ("override", "openslide.mpp-x", "ome.PhysicalSizeX", "tiff.XResolution", ...).
    """

    def __init__(self, path: str | os.PathLike, backend: Backend, mpp_override: float | None = None):
        self.path = Path(path)
        self.name = slide_name(path)
        self.mpp, self.mpp_source = choose_mpp(path, mpp_override, backend.pixel_sizes)
        self._backend = backend

    @property
    def backend(self) -> str:
        """The library that reads it: "openslide", "tifffile" or "pil"."""
        return self._backend.name

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height of level 0, px."""
        return self._backend.level_dimensions[0]

    @property
    def origin(self) -> tuple[int, int]:
        """Where the scanned area begins, (x, y) in level-0 px; (0, 0) where the slide does not say.

        MIRAX, Leica SCN and some BIF slides say it, and QuPath counts from there; all places here count from (0, 0).
        """
        return self._backend.origin

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each level, px, finest first."""
        return self._backend.level_dimensions

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Level-0 px per px of each level."""
        return self._backend.level_downsamples

    def upsamples(self, mpp: float) -> bool:
        """Whether tiles at this mpp have more pixels than the slide holds (they are smooth, not sharp)."""
        return is_enlarged(self.mpp, mpp)

    def field_of_view(self, x: float, y: float, width_px: int, height_px: int, mpp: float) -> FieldOfView:
        """What `read_region` reads with the same arguments: the level, and the exact field of view."""
        return find_field_of_view(self.level_downsamples, x, y, width_px, height_px, mpp / self.mpp)

    def read_region(self, x: float, y: float, width_px: int, height_px: int, mpp: float) -> np.ndarray:
        """Read a tile at exactly the mpp asked for.

        The field of view is read from the coarsest level that is as fine as `mpp`, and resized once (bicubic,
        antialiased; the field ends within a pixel where it must). At a level's own mpp nothing is resampled.

        Args:
            x, y: top-left corner, level-0 px; may lie outside the slide.
            width_px, height_px: size of the tile, px at `mpp`.
            mpp: um per pixel of the tile.

        Returns:
            (height_px, width_px, 3) uint8 RGB; white beyond the slide's edge.

        Raises:
            TileError: the place cannot be decoded; the next read works.
            ValueError: a size or the mpp is not positive.
        """
        if width_px < 1 or height_px < 1:
            raise ValueError(f"a region of {width_px} x {height_px} px has no pixel; ask for 1 x 1 or more")
        return self._read(x, y, int(width_px), int(height_px), check_mpp(mpp, "mpp") / self.mpp)

    def _read(self, x: float, y: float, width: int, height: int, scale: float) -> np.ndarray:
        view = find_field_of_view(self.level_downsamples, x, y, width, height, scale)
        pixels, offset = self._backend.read(view.level, x, y, view.level_width, view.level_height)
        return np.array(resize_field(pixels, offset, view))

    def overview(self, mpp: float = _OVERVIEW_MPP, most_pixels: int = _OVERVIEW_PIXELS) -> Overview:
        """The whole slide at a low magnification, for finding tissue.

        Args:
            mpp: um per pixel; the slide's own where that is larger.
            most_pixels: a larger slide is shown smaller.

        Returns:
            The picture, its downsample, and what of it cannot be read.
        """
        width, height = self.dimensions
        return self._overview(max(mpp / self.mpp, math.sqrt(width * height / most_pixels)))

    def thumbnail(self, max_size: int = 1024) -> tuple[np.ndarray, float]:
        """The whole slide, small.

        Args:
            max_size: the longer side, px; a smaller slide is not enlarged.

        Returns:
            (h, w, 3) uint8 RGB, and level-0 px per px of it.
        """
        if max_size < 1:
            raise ValueError(f"max_size is {max_size}, expected 1 or more")
        overview = self._overview(max(self.dimensions) / max_size)
        return overview.image, overview.downsample

    def _overview(self, downsample: float) -> Overview:
        downsample = max(downsample, 1.0)
        level = find_field_of_view(self.level_downsamples, 0, 0, 1, 1, downsample).downsample

        def read(x: float, y: float, width: int, height: int) -> np.ndarray:
            return self._read(x, y, width, height, downsample)

        return read_overview(self.dimensions, self.mpp, downsample, level, read)

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        self._backend.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        width, height = self.dimensions
        return f"<Slide {str(self.path)!r}, {width} x {height} px, {self.mpp:g} um/px, {self.backend}>"


def open_slide(
    path: str | os.PathLike,
    mpp_override: float | None = None,
    backend: str | None = None,
    *,
    cache_bytes: int = _CACHE_BYTES,
) -> Slide:
    """Open a slide of any format.

    OpenSlide opens what it knows, tifffile OME-TIFF and other TIFF files, Pillow PNG, JPEG, WebP and BMP. The content
    decides, not the suffix; but a .mrxs, .vms, .vmu or .dcm, which has companions, is never opened by Pillow unasked.

    Args:
        path: the slide's file (of a MIRAX slide the .mrxs, of a DICOM slide one .dcm).
        mpp_override: um per level-0 pixel, instead of what the file says.
        backend: use only this one of `BACKENDS`.
        cache_bytes: how many bytes of decoded pixels may be kept for neighbouring tiles.

    Returns:
        The slide.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: the file cannot be read.
        SlideError: it is empty, no slide, truncated, no RGB picture, or does not say how large its pixels are.
        ValueError: a wrong argument.
        ImportError: the library that it needs is missing.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"the backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    _check_file(path)
    check_not_truncated(path)
    opened = _open(path, backend, cache_bytes)
    try:
        return Slide(path, opened, mpp_override)
    except BaseException:
        opened.close()
        raise


def _check_file(path: str | os.PathLike) -> None:
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"the slide {name!r} does not exist; check its spelling")
    if os.path.isdir(name):
        raise IsADirectoryError(f"{name!r} is a folder; give a slide's file (MIRAX: the .mrxs beside the folder)")
    if os.path.getsize(name) == 0:
        raise EmptySlideError(f"{name!r} is empty (0 bytes); copy or export it again")


def _open(path: str | os.PathLike, backend: str | None, cache_bytes: int) -> Backend:
    if backend == "openslide":
        return OpenSlideBackend(path, cache_bytes)
    if backend == "tifffile":
        return TiffBackend(path, cache_bytes)
    if backend == "pil":
        return ImageBackend(path)
    return _open_first(path, cache_bytes)


def _open_first(path: str | os.PathLike, cache_bytes: int) -> Backend:
    reason = ""
    if openslide_knows(path):
        try:
            opened = OpenSlideBackend(path, cache_bytes)
        except NotASlideError as error:
            reason = f" ({error})"
        else:
            return _or_ome(opened, path, cache_bytes)
    if is_tiff(path):
        return TiffBackend(path, cache_bytes)
    missing = what_is_missing(path)
    # A .mrxs without its folder is a small JPEG, which must not be taken for the slide.
    if missing is not None:
        raise NotASlideError(f"{os.fspath(path)!r} is not a slide that OpenSlide can read{reason}: {missing}")
    try:
        return ImageBackend(path)
    except NotASlideError as error:
        raise NotASlideError(
            f"{os.fspath(path)!r} is not a slide that OpenSlide, tifffile or Pillow can read{reason}; check that it "
            "was copied whole, or export it as a tiled TIFF"
        ) from error


def _or_ome(opened: OpenSlideBackend, path: str | os.PathLike, cache_bytes: int) -> Backend:
    try:
        ome = opened.vendor == "generic-tiff" and is_ome_tiff(path)
    except BaseException:
        opened.close()
        raise
    if not ome:
        return opened
    opened.close()
    return TiffBackend(path, cache_bytes)
