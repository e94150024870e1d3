"""Features for an evaluation: computed once, kept beside the report, used again while nothing has changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssmamba_models.data.tile_files import TileFeatures, read_features
from ssmamba_models.data.tiles import TileDataset, TileFolder
from ssmamba_models.engine.embed import embed_tiles
from ssmamba_models.engine.encoder import Encoder

_TILES_KEY = "tiles_sha256"
# What makes features what they are; the device and torch's version move the last digits only.
_IDENTITY = (
    "model",
    "pool",
    "weights_sha256",
    "input_size",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "dtype",
    "ssmamba_models_version",
    "timm_version",
)


@dataclass(frozen=True)
class FeatureTable:
    """The features of tiles.

    Attributes:
        features: (N, D) float32, all finite.
        places: (N,) which tiles they are of, rising; unreadable tiles have no row.
        unreadable: (path, reason) of each tile that could not be read.
        provenance: what made them.
        reused: whether they were read from an earlier run's file.
    """

    features: np.ndarray
    places: np.ndarray
    unreadable: list[tuple[str, str]]
    provenance: dict[str, Any]
    reused: bool

    def rows(self, places: np.ndarray) -> np.ndarray:
        """The features of these tiles, which must all be there."""
        return self.features[np.searchsorted(self.places, places)]


def tile_features(
    tiles: TileFolder,
    encoder: Encoder,
    path: str | os.PathLike,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    progress: bool = True,
) -> FeatureTable:
    """Compute the features of tiles, or read them from the file that an earlier run left.

    The file counts only if its model, weights (by hash), transform and versions are those of `encoder`, and its tiles
    have the paths, sizes and times of change of `tiles`; else it is made anew.

    Args:
        tiles: the tiles, sorted by path.
        encoder: what computes the features.
        path: the HDF5 file to read or write; its folder must exist.
        batch_size, workers, progress: as `embed_folder`.

    Raises:
        ValueError: no tile is readable, or features are not finite.
        OSError: the file cannot be written, or a worker process died.
        ImportError: h5py is missing.
    """
    provenance = encoder.provenance()
    key = _tiles_key(tiles)
    kept = _read_kept(path, {**provenance, _TILES_KEY: key})
    if kept is None:
        embed_tiles(
            tiles,
            encoder,
            path,
            batch_size=batch_size,
            workers=workers,
            attributes={_TILES_KEY: key},
            overwrite=True,
            progress=progress,
            title=Path(path).stem,
        )
    table = read_features(path) if kept is None else kept
    place_of = {name: place for place, name in enumerate(tiles.paths)}
    places = np.array([place_of[name] for name in table.paths])
    return FeatureTable(table.features, places, _unreadable(tiles, encoder, places), table.attributes, kept is not None)


def _tiles_key(tiles: TileFolder) -> str:
    digest = hashlib.sha256()
    for path in tiles.paths:
        status = os.stat(tiles.root / path)
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _read_kept(path: str | os.PathLike, wanted: Mapping[str, Any]) -> TileFeatures | None:
    if not Path(path).is_file():
        return None
    try:
        kept = read_features(path)
    except ValueError:
        return None  # damaged: made anew
    same = all(_plain(kept.attributes.get(name)) == _plain(wanted.get(name)) for name in (*_IDENTITY, _TILES_KEY))
    return kept if same and np.isfinite(kept.features).all() else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _unreadable(tiles: TileFolder, encoder: Encoder, places: np.ndarray) -> list[tuple[str, str]]:
    # Read once more: a file of features does not keep the reasons.
    data = TileDataset(tiles, encoder.transform)
    missing = sorted(set(range(len(tiles))) - set(places.tolist()))
    return [(tiles.paths[place], data[place].reason) for place in missing]
