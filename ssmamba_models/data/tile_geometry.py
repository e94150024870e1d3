"""Where the tiles of a slide lie and how large they are: the attributes that a slide feature file has on `coords`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Name -> what it says, for messages. The order is that of the file's documentation.
GEOMETRY = {
    "patch_size": "side of a tile in pixels at target_mpp",
    "patch_size_level0": "side of a tile in level-0 pixels",
    "overlap": "overlap of neighbouring tiles in pixels at target_mpp",
    "level0_mpp": "micrometres per pixel of level 0",
    "target_mpp": "micrometres per pixel of the tiles",
    "level0_width": "width of level 0 in pixels",
    "level0_height": "height of level 0 in pixels",
    "name": "the slide's name",
}

# Where the scanned area begins, level-0 pixels; only slides that say it (MIRAX, Leica SCN) have these attributes.
ORIGIN = ("origin_x", "origin_y")

_COUNTS = (*ORIGIN, "patch_size", "overlap", "level0_width", "level0_height")


class TileGeometry:
    """The geometry in `coords_attributes`, one property each; what has `coords_attributes` inherits it."""

    coords_attributes: Mapping[str, Any]

    @property
    def patch_size(self) -> int:
        """Side of a tile in pixels at `target_mpp`."""
        return self.coords_attributes["patch_size"]

    @property
    def patch_size_level0(self) -> int | float:
        """Side of a tile in level-0 pixels, exact: patch_size * target_mpp / level0_mpp."""
        return self.coords_attributes["patch_size_level0"]

    @property
    def overlap(self) -> int:
        """Overlap of neighbouring tiles in pixels at `target_mpp`."""
        return self.coords_attributes["overlap"]

    @property
    def level0_mpp(self) -> float:
        """Micrometres per pixel of level 0."""
        return self.coords_attributes["level0_mpp"]

    @property
    def target_mpp(self) -> float:
        """Micrometres per pixel of the tiles."""
        return self.coords_attributes["target_mpp"]

    @property
    def level0_width(self) -> int:
        """Width of level 0 in pixels."""
        return self.coords_attributes["level0_width"]

    @property
    def level0_height(self) -> int:
        """Height of level 0 in pixels."""
        return self.coords_attributes["level0_height"]

    @property
    def name(self) -> str:
        """The slide's name."""
        return self.coords_attributes["name"]

    @property
    def origin(self) -> tuple[int, int]:
        """Where the scanned area begins, (x, y) in level-0 pixels: QuPath counts from there, `coords` from (0, 0)."""
        x, y = (self.coords_attributes.get(name, 0) for name in ORIGIN)
        return x, y


def check_geometry(attributes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the geometry, and give whole numbers as int, whatever they were stored as (512.0 is 512).

    Args:
        attributes: all of `GEOMETRY`, by choice `ORIGIN`, and any others, which are left as they are.
        where: the file or slide, for messages.

    Returns:
        The same attributes, with the geometry's of one type each.

    Raises:
        ValueError: one is missing, of the wrong type or impossible.
    """
    missing = [name for name in GEOMETRY if name not in attributes]
    if missing:
        raise ValueError(
            f"{where}: coords lack the attribute{'s' if len(missing) > 1 else ''} {', '.join(missing)}; if CLAM or "
            "TRIDENT wrote it, `ssmamba convert` makes one of ours from it"
        )
    stated = (*GEOMETRY, *(name for name in ORIGIN if name in attributes))
    checked = {**attributes, **{name: clean(name, attributes[name], where) for name in stated}}
    if checked["overlap"] >= checked["patch_size"]:
        raise ValueError(
            f"{where}: an overlap of {checked['overlap']} px does not fit tiles of {checked['patch_size']} px"
        )
    return checked


def clean(name: str, value: Any, where: str) -> Any:
    """One attribute of the geometry with its type put right.

    Raises:
        ValueError: it cannot be what the name says.
    """
    if name == "name":
        if not isinstance(value, str) or not value:
            raise ValueError(f"{where}: the attribute name is {value!r}, expected the slide's name")
        return value
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: the attribute {name} is {value!r}, expected a number") from error
    may_be_0 = name in ("overlap", *ORIGIN)
    least = "at least 0" if may_be_0 else "above 0"
    if not math.isfinite(number) or number < 0 or (number == 0 and not may_be_0):
        raise ValueError(f"{where}: the attribute {name} is {value!r}, expected a number {least}")
    whole = number == int(number)
    if name in _COUNTS and not whole:
        raise ValueError(f"{where}: the attribute {name} is {value!r}, expected a whole number")
    return int(number) if whole and (name in _COUNTS or name == "patch_size_level0") else number


def level0_side(patch_size: float, target_mpp: float, level0_mpp: float) -> int | float:
    """Side of a tile in level-0 pixels; int where it is whole."""
    side = patch_size * target_mpp / level0_mpp
    nearest = round(side)
    # 224 * 0.5 / 0.25 may miss 448 by a rounding of floats.
    return nearest if nearest and math.isclose(side, nearest, rel_tol=1e-12) else side


def is_enlarged(level0_mpp: float, target_mpp: float) -> bool:
    """Whether tiles have more pixels than the slide holds there: a finer mpp was asked for than it was scanned at.

    Args:
        level0_mpp, target_mpp: um per pixel of level 0, and of the tiles.
    """
    return target_mpp < level0_mpp * (1 - 1e-6)
