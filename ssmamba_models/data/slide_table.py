"""A table (CSV) of what is known of slides, for files that do not say it: one row per slide, at least its mpp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ssmamba_models.data.csv_rows import column_places, read_csv_rows
from ssmamba_models.data.tile_geometry import GEOMETRY, clean

# The column's usual name is shorter than the attribute's.
_COLUMNS = {"mpp": "level0_mpp", **{name: name for name in GEOMETRY if name != "name"}}


def read_slide_table(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Read a table of slides.

    Args:
        path: a CSV file with the column `slide` (a slide's name or file name) and any of mpp (of level 0), target_mpp,
            patch_size, patch_size_level0, overlap, level0_width and level0_height. Empty cells and other columns are
            passed over.

    Returns:
        Slide name -> attribute -> value. A slide given by its file name is found by its name as well.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no CSV, a column is missing, a number is wrong, or a slide has two rows that differ.
    """
    titles, rows = read_csv_rows(Path(path), "slide")
    places = column_places(Path(path), titles, ("slide", *_COLUMNS))
    if "slide" not in places or len(places) < 2:
        raise ValueError(
            f"{os.fspath(path)!r} has the columns {', '.join(sorted(titles))}; expected slide and any of "
            f"{', '.join(_COLUMNS)}"
        )
    table: dict[str, dict[str, Any]] = {}
    for line, fields in rows:
        cells = {name: fields[place].strip() for name, place in places.items()}
        where = f"{os.fspath(path)!r} line {line}"
        facts = {_COLUMNS[name]: clean(_COLUMNS[name], cells[name], where) for name in _COLUMNS if cells.get(name)}
        _enter(table, cells["slide"], facts, where)
    return table


def _enter(table: dict[str, dict[str, Any]], slide: str, facts: dict[str, Any], where: str) -> None:
    if not slide:
        raise ValueError(f"{where}: no slide is named")
    for name in {slide, Path(slide).stem.removesuffix(".ome")}:
        if table.setdefault(name, facts) != facts:
            raise ValueError(f"{where}: {slide!r} stands in two rows that differ; keep one")
