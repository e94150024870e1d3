"""How large a pixel is: from the user, the file's own metadata, or its resolution tags; never a guess."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssmamba_models.data.slide_table import read_slide_rows, slide_name
from ssmamba_models.wsi.errors import MissingMppError, UnsupportedSlideError

# Microscope scans lie between 0.05 and 5 um/px; 10 um/px is 2540 dpi, beyond which resolution tags speak of
# screens and printers (72 dpi is 353 um/px).
_SMALLEST, _LARGEST = 0.01, 10.0

# Scanners state x and y apart by rounding (0.2270972 and 0.2271024); more than this is another shape of pixel.
_SQUARE = 0.01

# TIFF 6.0, tag 296 (ResolutionUnit); 1 means that the resolution tags only tell the aspect ratio.
_MICRONS_PER_UNIT = {2: 25_400.0, 3: 10_000.0}

_CURE = "give it with --mpp-override (mpp_override=...) or --mpp-csv"


@dataclass(frozen=True)
class PixelSize:
    """The size of a level-0 pixel as some part of a file states it.

    Attributes:
        x, y: um.
        source: where it was found, as "openslide.mpp-x" or "tiff.XResolution".
    """

    x: float
    y: float
    source: str

    @property
    def plausible(self) -> bool:
        """Whether a microscope can have made such pixels."""
        return all(math.isfinite(size) and _SMALLEST <= size <= _LARGEST for size in (self.x, self.y))


def pixel_size_from_resolution(x: float, y: float, unit: int, source: str) -> PixelSize | None:
    """Turn TIFF resolution tags into a pixel size.

    Args:
        x, y: pixels per unit.
        unit: the tag ResolutionUnit: 1 none, 2 inch, 3 centimetre.
        source: what to call it.

    Returns:
        The size, or None where the unit or a resolution says nothing.
    """
    microns = _MICRONS_PER_UNIT.get(unit)
    if microns is None or not (x > 0 and y > 0):
        return None
    return PixelSize(microns / x, microns / y, source)


def choose_mpp(path: str | os.PathLike, override: float | None, stated: Sequence[PixelSize]) -> tuple[float, str]:
    """The mpp of a slide.

    Args:
        path: the slide, for messages.
        override: what the user says, um/px; goes before everything.
        stated: what the file says, most trusted first.

    Returns:
        um per level-0 pixel (the mean of x and y, which differ by 1 % at most) and its source.

    Raises:
        ValueError: the override is no length of a pixel.
        MissingMppError: there is neither an override nor a plausible statement.
        UnsupportedSlideError: pixels are not square.
    """
    if override is not None:
        return check_mpp(override, "mpp_override"), "override"
    size = next((size for size in stated if size.plausible), None)
    if size is None:
        raise MissingMppError(f"{os.fspath(path)!r} does not say how large its pixels are{_rejected(stated)}; {_CURE}")
    mean = (size.x + size.y) / 2
    if abs(size.x - size.y) > _SQUARE * mean:
        raise UnsupportedSlideError(
            f"the pixels of {os.fspath(path)!r} are not square ({size.x:g} x {size.y:g} um, {size.source}); "
            "resample the slide, or if the metadata is wrong give the true size with --mpp-override"
        )
    return mean, size.source


def check_mpp(mpp: float, name: str) -> float:
    """Make sure that a number can be an mpp.

    Args:
        mpp: um per pixel.
        name: what to call it in the message.

    Returns:
        The mpp, as a float.

    Raises:
        ValueError: it is not a finite positive number, or so large or small that its unit is not um.
    """
    value = float(mpp)
    if not (math.isfinite(value) and _SMALLEST <= value <= 100 * _LARGEST):
        raise ValueError(f"{name} is {mpp}, expected micrometres per pixel (0.25 for most 40x scans, 0.5 for 20x)")
    return value


def _rejected(stated: Sequence[PixelSize]) -> str:
    if not stated:
        return ""
    size = stated[0]
    return f" ({size.source} would mean {size.x:g} x {size.y:g} um per pixel, which no slide scanner makes)"


def read_mpp_csv(path: str | os.PathLike) -> dict[str, float]:
    """Read a table of slides and their mpp.

    Args:
        path: a CSV file with columns `slide` (a slide's name or file name) and `mpp` (um per level-0 pixel).

    Returns:
        For each slide its mpp; see `find_mpp`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no CSV, a column is missing, a number is wrong, or a slide has two.
    """
    table: dict[str, float] = {}
    for slide, cells, where in read_slide_rows(path, ("mpp",), "a CSV whose first line is: slide,mpp"):
        mpp = _read_mpp(cells["mpp"], slide, where)
        if table.setdefault(slide, mpp) != mpp:
            raise ValueError(f"{where}: {slide!r} has two mpp, {table[slide]:g} and {mpp:g}; keep one")
    return table


def _read_mpp(text: str, slide: str, where: str) -> float:
    try:
        return check_mpp(float(text), "mpp")
    except ValueError as error:
        raise ValueError(f"{where}: the mpp of {slide!r} is {text!r}, expected a number such as 0.25") from error


def find_mpp(table: Mapping[str, float], path: str | os.PathLike) -> float | None:
    """Look a slide up in what `read_mpp_csv` returned: by its file name, then by its name.

    Args:
        table: name or file name -> mpp.
        path: the slide.

    Returns:
        Its mpp, or None where the table does not name it.
    """
    return table.get(Path(path).name, table.get(slide_name(path)))
