"""Tables (CSV) of what is known of slides, for files that do not say it: one row per slide, at least its mpp."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmamba_models.data.csv_rows import column_places, read_csv_rows
from ssmamba_models.data.tile_geometry import GEOMETRY, clean

# The column's usual name is shorter than the attribute's.
_COLUMNS = {"mpp": "level0_mpp", **{name: name for name in GEOMETRY if name != "name"}}
_DOUBLE_SUFFIXES = (".ome",)
# Files worth trying when a folder is searched for slides; what a file is, its content decides.
SLIDE_SUFFIXES = frozenset(
    {".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".czi", ".tif", ".tiff", ".btf"}
    | {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
)
# In an entry of a table, all else after a dot is a part of the name: "P1.A" and "P1.B" are two slides.
_KNOWN_SUFFIXES = SLIDE_SUFFIXES | {".qptiff", ".isyntax", ".h5", ".pt"}


def slide_name(path: str | os.PathLike) -> str:
    """A slide's name: its file's name without the suffix (`case1.svs`, `case1.ome.tif` -> `case1`)."""
    stem, inner = os.path.splitext(Path(path).stem)
    # Dots are common in names (TCGA's among them), so only known double suffixes are taken off whole.
    return stem if inner.lower() in _DOUBLE_SUFFIXES else stem + inner


def names_of_entry(entry: str) -> tuple[str, ...]:
    """The names that a slide may go by which a table names: as it stands, then without folder and known suffixes.

    Args:
        entry: a slide's name or file name.

    Returns:
        The names, each once: `a.svs` -> `a.svs`, `a`; `a.ome.tif` -> `a.ome.tif`, `a.ome`, `a`; `P1.A` -> `P1.A`. The
        first that there is counts.
    """
    name = Path(entry).name
    if os.path.splitext(name)[1].lower() not in _KNOWN_SUFFIXES:
        return tuple(dict.fromkeys((entry, name)))
    return tuple(dict.fromkeys((entry, Path(name).stem, slide_name(name))))


def read_slide_rows(
    path: str | os.PathLike, columns: Sequence[str], expected: str
) -> Iterator[tuple[str, Mapping[str, str], str]]:
    """Read the rows of a table of slides.

    Args:
        path: a CSV file with the column `slide` and one or more of `columns`.
        columns: the other columns to read; the first is named where there is none of them.
        expected: what the table should be, for the message about missing columns.

    Yields:
        The slide as the row has it (a name or a file name), column -> cell of the `columns` that are there, without
        blanks around, and where it stands, for messages.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no CSV, a column is missing, or a row names no slide.
    """
    titles, rows = read_csv_rows(Path(path), "slide")
    places = column_places(Path(path), titles, ("slide", *columns))
    missing = [] if any(name in places for name in columns) else [columns[0]]
    missing += [] if "slide" in places else ["slide"]
    if missing:
        raise ValueError(f"{os.fspath(path)!r} has no column {' and no column '.join(missing)}; expected {expected}")
    for line, fields in rows:
        cells = {name: fields[place].strip() for name, place in places.items()}
        where = f"{os.fspath(path)!r} line {line}"
        slide = cells.pop("slide")
        if not slide:
            raise ValueError(f"{where}: no slide is named")
        yield slide, cells, where


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
    table: dict[str, dict[str, Any]] = {}
    for slide, cells, where in read_slide_rows(path, tuple(_COLUMNS), f"slide and any of {', '.join(_COLUMNS)}"):
        # In the order of `_COLUMNS`, not of the file: of two names for one fact the later one counts.
        facts = {_COLUMNS[name]: clean(_COLUMNS[name], cells[name], where) for name in _COLUMNS if cells.get(name)}
        for name in names_of_entry(slide):
            if table.setdefault(name, facts) != facts:
                raise ValueError(f"{where}: {slide!r} stands in two rows that differ; keep one")
    return table
