"""Slides that are one PNG, JPEG, WebP or BMP picture: decoded once, kept in memory."""

from __future__ import annotations

import os
import warnings

from PIL import Image, UnidentifiedImageError

from ssmamba_models.data.rgb import to_rgb
from ssmamba_models.notice import one_line
from ssmamba_models.wsi.backend import crop_white, whole_count, whole_start
from ssmamba_models.wsi.errors import NotASlideError, TruncatedSlideError, UnsupportedSlideError
from ssmamba_models.wsi.mpp import PixelSize, pixel_size_from_resolution

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


class ImageBackend:
    """A picture opened by Pillow (see `Backend`).

    Args:
        path: the picture.

    Raises:
        NotASlideError: no format that Pillow is asked to read here.
        TruncatedSlideError: its pixels cannot all be decoded.
        UnsupportedSlideError: it is too large for memory, or has no conversion to RGB.
        OSError: the file cannot be read.
    """

    name = "pil"
    origin = (0, 0)

    def __init__(self, path: str | os.PathLike):
        self._image, self.pixel_sizes = _load(path)
        self.level_dimensions = (self._image.size,)
        self.level_downsamples = (1.0,)

    def read(
        self, level: int, left: float, top: float, width: float, height: float
    ) -> tuple[Image.Image, tuple[float, float]]:
        (x, rest_x), (y, rest_y) = whole_start(left), whole_start(top)
        size = (whole_count(rest_x, width), whole_count(rest_y, height))
        return crop_white(self._image, x, y, *size), (rest_x, rest_y)

    def close(self) -> None:
        self._image.close()


def _load(path: str | os.PathLike) -> tuple[Image.Image, list[PixelSize]]:
    name = os.fspath(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                stated = _pixel_sizes(image)
                return to_rgb(image), stated
    except UnidentifiedImageError as error:
        raise NotASlideError(f"{name!r} is no picture that Pillow reads ({', '.join(_FORMATS)})") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise UnsupportedSlideError(
            f"{name!r} is too large to be decoded whole ({one_line(error)}); save it as a tiled, pyramidal TIFF "
            "(vips tiffsave --tile --pyramid)"
        ) from error
    except ValueError as error:
        raise UnsupportedSlideError(f"{name!r} cannot be read as RGB: {one_line(error)}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise TruncatedSlideError(f"{name!r} is cut short or corrupt ({one_line(error)}); copy it again") from error
    # Broken files make Pillow's decoders raise SyntaxError, struct.error, EOFError, IndexError and others.
    except Exception as error:
        raise NotASlideError(f"{name!r} is corrupt ({one_line(error)}); copy it again") from error


def _pixel_sizes(image: Image.Image) -> list[PixelSize]:
    dots = image.info.get("dpi")
    size = pixel_size_from_resolution(float(dots[0]), float(dots[1]), 2, "picture's dpi") if dots else None
    return [size] if size else []
