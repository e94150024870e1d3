"""Mosaics on disk: as slide feature files with labels, and as tiles with a manifest that says where each lies."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssmamba_models.data.features import write_slide_features
from ssmamba_models.data.labelled import MANIFEST, LabelledTiles
from ssmamba_models.data.mosaics import Mosaic
from ssmamba_models.output import whole_file

LABELS = "labels.csv"


def write_mosaic_features(
    mosaics: Sequence[Mosaic],
    features: np.ndarray,
    attributes: Mapping[str, Any],
    folder: str | os.PathLike,
    *,
    bags: Callable[[Mosaic], tuple[np.ndarray, np.ndarray]] | None = None,
    tile_size: int = 224,
    mpp: float = 0.5,
) -> Path:
    """Write a slide feature file for each mosaic, and labels.csv (slide, label, patient) beside them.

    Args:
        mosaics: the slides.
        features: (N, D) of the tiles that they were assembled from.
        attributes: the provenance of the features, such as `TileFeatures.attributes`.
        folder: made if missing.
        bags: mosaic -> its bags of shared augmentation: features (A, n, D), and of which cells they are, (A, n),
            counted row by row; None writes none.
        tile_size: side of a tile in pixels.
        mpp: that the tiles are taken to have, in micrometres per pixel.

    Returns:
        The path of labels.csv.

    Raises:
        OSError: a file exists already, or cannot be written.
        ImportError: h5py is missing.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for mosaic in mosaics:
        drawn = None if bags is None else bags(mosaic)
        height, width = mosaic.tiles.shape
        geometry = {
            "patch_size": tile_size,
            "patch_size_level0": tile_size,
            "overlap": 0,
            "level0_mpp": mpp,
            "target_mpp": mpp,
            "level0_width": width * tile_size,
            "level0_height": height * tile_size,
            "name": mosaic.name,
        }
        with write_slide_features(
            root / f"{mosaic.name}.h5",
            features.shape[1],
            coords_attributes=geometry,
            attributes=attributes,
            bag_tiles=None if drawn is None else drawn[0].shape[1],
        ) as writer:
            writer.append(features[mosaic.tiles.reshape(-1)], mosaic.places * tile_size)
            for bag, cells in zip(*drawn) if drawn else ():
                writer.append_bag(bag, mosaic.places[cells] * tile_size)
    rows = [(mosaic.name, mosaic.label, mosaic.patient) for mosaic in mosaics]
    return _write_rows(root / LABELS, [("slide", "label", "patient"), *rows])


def write_mosaic_tiles(
    mosaics: Sequence[Mosaic], tiles: LabelledTiles, folder: str | os.PathLike, splits: Mapping[str, str] | None = None
) -> Path:
    """Write the tiles of mosaics as `folder/<slide>/<x>_<y>.<suffix>`, with a manifest.csv.

    Args:
        mosaics: the slides.
        tiles: what they were assembled from; the files are copied as they are.
        folder: made if missing.
        splits: patient -> split; None leaves the column out.

    Returns:
        The path of manifest.csv: path, slide, x, y (in tiles), label (the tile's class), group (the patient), split.

    Raises:
        OSError: a tile cannot be read, or a file cannot be written.
    """
    root, labels = Path(folder), tiles.known_labels
    rows = []
    for mosaic in mosaics:
        (root / mosaic.name).mkdir(parents=True, exist_ok=True)
        for index, (x, y) in zip(mosaic.tiles.reshape(-1), mosaic.places):
            source = tiles.root / tiles.paths[index]
            path = f"{mosaic.name}/{x}_{y}{source.suffix}"
            shutil.copyfile(source, root / path)
            row = (path, mosaic.name, x, y, labels[index], mosaic.patient)
            rows.append(row if splits is None else (*row, splits[mosaic.patient]))
    header = ("path", "slide", "x", "y", "label", "group") + (() if splits is None else ("split",))
    return _write_rows(root / MANIFEST, [header, *rows])


def draw_mosaic(mosaic: Mosaic, tiles: LabelledTiles, tile_size: int = 224) -> Image.Image:
    """Paint a mosaic.

    Returns:
        An RGB image of H * tile_size by W * tile_size pixels.

    Raises:
        OSError: a tile cannot be read.
    """
    height, width = mosaic.tiles.shape
    canvas = Image.new("RGB", (width * tile_size, height * tile_size))
    for index, (x, y) in zip(mosaic.tiles.reshape(-1), mosaic.places):
        with Image.open(tiles.root / tiles.paths[index]) as tile:
            canvas.paste(tile.convert("RGB").resize((tile_size, tile_size)), (int(x) * tile_size, int(y) * tile_size))
    return canvas


def remember_mosaics(out: str | os.PathLike, made_of: Mapping[str, Any]) -> None:
    """Make sure that a folder's mosaics are these: what is kept of one set must not be scored as another.

    Args:
        out: the folder; mosaics.json in it remembers.
        made_of: what the mosaics follow from: tiles, features, classes, sizes, seed.

    Raises:
        FileExistsError: the folder remembers others.
        OSError: it cannot be written.
    """
    file, text = Path(out) / "mosaics.json", json.dumps(dict(made_of), indent=2, default=str) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise FileExistsError(f"{str(file)!r}: the slides there are made of something else; give another --out")
    with whole_file(file, overwrite=True) as part:
        part.write_text(text, encoding="utf-8")


def _write_rows(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    with whole_file(path, overwrite=True) as part, open(part, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path
