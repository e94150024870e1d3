"""Tiles that know where they lay: a manifest with the slide of each, and its place in the grid of that slide."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from ssmamba_models.data.csv_rows import Row, column_places, read_csv_rows
from ssmamba_models.data.labelled import MANIFEST, LabelledTiles, manifest_column, read_manifest, tile_path

COLUMNS = ("path", "slide", "x", "y")
# Places in a grid differ by less somewhere in some slide; pixel coordinates never do.
_LEAST_PIXEL_STEP = 16
# Tiles that were cut in a grid have others nearer than this, in tiles; in pixels none does, grid or not.
_NEAR = 8
_LARGEST = 2**31


@dataclass(frozen=True, eq=False)
class SpatialTiles(LabelledTiles):
    """Tiles with what is known of each, and where it lay.

    Attributes:
        slides: N names.
        x, y: (N,) int64, column and row in the grid of the slide: neighbours differ by 1.
    """

    slides: tuple[str, ...] = ()
    x: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    y: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    traits: ClassVar[str] = "paths, places, labels, groups or splits"

    def subset(self, indices: Iterable[int]) -> SpatialTiles:
        """As `LabelledTiles.subset`; tiles keep their places."""
        places = list(indices)
        kept = super().subset(places)
        return SpatialTiles(
            kept.root,
            kept.paths,
            kept.labels,
            kept.groups,
            kept.splits,
            tuple(self.slides[place] for place in places),
            self.x[places],
            self.y[places],
        )

    def sha256(self) -> str:
        """As `LabelledTiles.sha256`, with slides and places."""
        digest = hashlib.sha256(super().sha256().encode())
        digest.update("\n".join(self.slides).encode("utf-8", "surrogateescape"))
        digest.update(np.stack([self.x, self.y]).astype("<i8").tobytes())
        return digest.hexdigest()

    def single_tile_slides(self) -> tuple[str, ...]:
        """The slides that have but one tile, which therefore has no neighbours, sorted."""
        return tuple(sorted(slide for slide, count in Counter(self.slides).items() if count == 1))


def read_spatial_tiles(source: str | os.PathLike) -> SpatialTiles:
    """Read a manifest of tiles with their places.

    Args:
        source: a CSV file, or a folder with a manifest.csv, of the columns path (relative to the file's folder), slide,
            x and y (whole numbers, in grid units: neighbours differ by 1) and, each optional, label (or class), group
            and split. Other columns are ignored.

    Returns:
        The tiles, sorted by path. A slide may have a single tile (see `SpatialTiles.single_tile_slides`).

    Raises:
        ValueError: a column is missing, a coordinate is no whole number, two tiles of a slide have one place, or the
            coordinates look like pixels; also as `read_tiles`.
        FileNotFoundError: there is no such file or folder, no manifest.csv in it, or a tile that it lists is missing.
        OSError: the file cannot be read.
    """
    manifest = _find_manifest(Path(source))
    header, rows = read_csv_rows(manifest, "tile")
    names = column_places(manifest, header, COLUMNS)
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(
            f"{str(manifest)!r} has no column {' and none '.join(map(repr, missing))} (its columns: "
            f"{', '.join(header)}); tiles with places need a first line such as path,slide,x,y, with x and y in grid "
            "units"
        )
    paths, slides = (manifest_column(manifest, rows, name, names[name]) for name in ("path", "slide"))
    x, y = (_coordinates(manifest, rows, name, names[name]) for name in ("x", "y"))
    _check_places(manifest, rows, slides, x, y)
    _check_grid_units(manifest, slides, x, y)
    tiles = read_manifest(manifest)
    row_of = {tile_path(tiles.root, manifest, line, text): n for n, ((line, _), text) in enumerate(zip(rows, paths))}
    order = [row_of[path] for path in tiles.paths]
    slides = tuple(slides[row] for row in order)
    return SpatialTiles(tiles.root, tiles.paths, tiles.labels, tiles.groups, tiles.splits, slides, x[order], y[order])


def _find_manifest(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.exists():
        raise FileNotFoundError(f"the manifest {str(source)!r} does not exist; give a CSV, or the folder that holds it")
    if not (source / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{str(source)!r} holds no {MANIFEST}; tiles with places need one, with the columns {','.join(COLUMNS)}"
        )
    return source / MANIFEST


def _coordinates(manifest: Path, rows: list[Row], name: str, place: int) -> np.ndarray:
    values = []
    for (line, _), text in zip(rows, manifest_column(manifest, rows, name, place)):
        try:
            number = float(text)
        except ValueError:
            number = np.nan
        # Tables that went through pandas have 3.0 for 3.
        if not number.is_integer() or abs(number) >= _LARGEST:
            raise ValueError(
                f"{str(manifest)!r}, line {line}: {name} is {text!r}, expected a whole number in grid units: "
                "(pixel coordinate) / (step between tiles)"
            )
        values.append(int(number))
    return np.array(values, dtype=np.int64)


def _check_places(manifest: Path, rows: list[Row], slides: tuple[str, ...], x: np.ndarray, y: np.ndarray) -> None:
    seen: dict[tuple[str, int, int], int] = {}
    for (line, _), place in zip(rows, zip(slides, x.tolist(), y.tolist())):
        other = seen.setdefault(place, line)
        if other != line:
            raise ValueError(
                f"{str(manifest)!r}, lines {other} and {line}: two tiles lie at x {place[1]}, y {place[2]} of slide "
                f"{place[0]!r}; a place holds one tile: remove one, or tell slides apart by their names"
            )


def _check_grid_units(manifest: Path, slides: tuple[str, ...], x: np.ndarray, y: np.ndarray) -> None:
    """Refuse coordinates of which all differences within every slide are multiples of a large step, or all large."""
    _, slide = np.unique(np.asarray(slides), return_inverse=True)
    order = np.argsort(slide, kind="stable")
    steps = []
    for members in np.split(order, np.flatnonzero(np.diff(slide[order])) + 1):
        across, down = (int(np.gcd.reduce(axis[members] - axis[members[0]])) for axis in (x, y))
        if across or down:
            steps.append((across, down))
    if not steps:
        return
    if any(0 < step < _LEAST_PIXEL_STEP for pair in steps for step in pair):
        _check_near(manifest, slide, x, y)
        return
    across, down = (int(np.gcd.reduce([pair[axis] for pair in steps])) for axis in (0, 1))
    step = next((str(a) for a, b in ((across, down), (down, across)) if b in (0, a)), f"{across} in x and {down} in y")
    raise ValueError(
        f"the coordinates in {str(manifest)!r} look like pixels: within every slide they differ by multiples of "
        f"{step}; expected grid units, in which neighbours differ by 1: divide x and y by the step between tiles"
    )


def _check_near(manifest: Path, slide: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Refuse coordinates of which no two in any slide are near each other: pixels without a common step."""
    # Squares twice as wide, four times, each half a width further: what is nearer than half a width shares one of them.
    for right in (0, _NEAR):
        for below in (0, _NEAR):
            squares = np.stack([slide, (x + right) // (2 * _NEAR), (y + below) // (2 * _NEAR)], axis=1)
            if len(np.unique(squares, axis=0)) < len(squares):
                return
    raise ValueError(
        f"the coordinates in {str(manifest)!r} look like pixels: in no slide do two tiles lie within {_NEAR} units of "
        "each other; expected grid units, in which neighbours differ by 1: divide x and y by the step between tiles, "
        "and round"
    )
