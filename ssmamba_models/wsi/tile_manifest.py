"""manifest.csv of tiles cut from slides: a line for each tile, with its slide and place, and the labels of slides."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ssmamba_models.data.slide_labels import check_patient_splits, match_slides, read_slide_labels, some_names
from ssmamba_models.data.spatial_tiles import COLUMNS
from ssmamba_models.output import whole_file

# Slide -> label, patient, and split, which is None in a table without splits.
Labels = Mapping[str, Mapping[str, str | None]]


def read_tile_labels(table: str | os.PathLike, slides: Collection[str], known: Collection[str]) -> Labels:
    """Read the labels of slides whose tiles get a manifest.

    Args:
        table: CSV (see `read_slide_labels`).
        slides: names; each needs a line.
        known: names of all slides that there are, those included that need no line.

    Returns:
        The labels of the known slides that the table names.

    Raises:
        FileNotFoundError, OSError: the table cannot be read.
        ValueError: it is no such table, names a slide twice or lacks one, or has a patient in two splits.
    """
    found, others = match_slides(read_slide_labels(table), {*slides, *known}, table)
    lacking = sorted(set(slides) - set(found))
    if lacking:
        unknown = f"; what it names and is not here: {some_names(others)}" if others else ""
        raise ValueError(
            f"{os.fspath(table)!r} has no line for {len(lacking)} of the {len(slides)} slides ({some_names(lacking)})"
            f"{unknown}; every tile of a manifest needs a label: add the lines, or leave the slides out"
        )
    check_patient_splits(found, table)
    return found


def write_manifest(path: Path, tiles: Mapping[str, Sequence[tuple[str, int, int]]], labels: Labels | None) -> None:
    """Write a manifest, whole or not at all.

    Args:
        path: manifest.csv.
        tiles: slide -> path, column and row of each of its tiles.
        labels: of these slides: they fill the columns label, group (the patient) and, where there are any, split.

    Raises:
        OSError: it cannot be written.
    """
    split = any(facts["split"] is not None for facts in (labels or {}).values())
    columns = {} if labels is None else {"label": "label", "group": "patient"} | ({"split": "split"} if split else {})
    with whole_file(path, overwrite=True) as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow((*COLUMNS, *columns))
        for slide in sorted(tiles):
            facts = [] if labels is None else [labels[slide][name] for name in columns.values()]
            table.writerows((tile, slide, x, y, *facts) for tile, x, y in tiles[slide])
