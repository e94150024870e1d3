"""Slide feature files: the features of a slide's N tiles in one HDF5 file that says where they lie and come from.

Layout: `features` (N, D) float32 or float16, `coords` (N, 2) int64 level-0 pixels (x, y) of the tiles' top-left
corners, by choice `grid` (N, h, w, D) token maps and `bags` of shared augmentation (see `feature_bags`). The geometry
(see `tile_geometry.GEOMETRY`) stands as attributes on `coords`, the provenance (model, weights, transform, versions) as
attributes on the file. Nothing in it depends on the time, the machine's paths or the size of the batches, so the same
features give the same bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssmamba_models.data.careful_file import CarefulFile, create_hdf5
from ssmamba_models.data.feature_bags import BAG_COORDS, BAG_FEATURES, FeatureBags, find_bags
from ssmamba_models.data.hdf5 import (
    RowWriter,
    damage_named,
    open_hdf5,
    plain_attributes,
    require_h5py,
    write_attributes,
)
from ssmamba_models.data.tile_geometry import TileGeometry, check_geometry
from ssmamba_models.output import whole_file
from ssmamba_models.stopping import stops_wait

_DTYPES = {"float32": np.float32, "float16": np.float16}
_MAKER = "`ssmamba extract`"
_CURE = "extract (or convert) the slide again"


@dataclass(frozen=True)
class SlideFeatures(TileGeometry):
    """What a slide feature file holds; the geometry is also at hand as properties (`patch_size`, `level0_mpp`, ...).

    Attributes:
        features: (N, D) float32 or float16, as stored; None where they were not asked for.
        coords: (N, 2) int64, level-0 pixels (x, y) of the tiles' top-left corners.
        coords_attributes: the geometry (see `tile_geometry.GEOMETRY`), and what a foreign layout said besides.
        attributes: the provenance, name -> value.
        grid: (N, h, w, D) token maps; None where there are none, or they were not asked for.
        bags: of shared augmentation, features (n, D) and coords (n, 2) of each; None as with `grid`.
    """

    features: np.ndarray | None
    coords: np.ndarray
    coords_attributes: Mapping[str, Any]
    attributes: Mapping[str, Any]
    grid: np.ndarray | None = None
    bags: list[tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def tile_grid(self) -> np.ndarray:
        """(N, 2) float64: coords in tiles, `coords / patch_size_level0`."""
        return self.coords / self.patch_size_level0


class SlideFeatureWriter:
    """Appends batches of tiles to an open slide feature file; `write_slide_features` makes one."""

    def __init__(
        self,
        file: Any,
        disk: CarefulFile,
        rows: RowWriter,
        embed_dim: int,
        dtype: np.dtype,
        grid_shape: tuple[int, ...] | None,
        bags: RowWriter | None = None,
    ) -> None:
        self._file, self._disk = file, disk
        self._rows, self._bags = rows, bags
        self._dtype = dtype
        self.embed_dim = embed_dim
        self.grid_shape = grid_shape

    @property
    def count(self) -> int:
        """N so far."""
        return self._rows.count

    def append(self, features: np.ndarray, coords: np.ndarray, grid: np.ndarray | None = None) -> None:
        """Add B tiles.

        Args:
            features: (B, D) of any float type, stored in the file's.
            coords: (B, 2) of any integer type.
            grid: (B, h, w, D); required if and only if the file has token maps.

        Raises:
            ValueError: they do not fit each other or the file, or are too large for float16.
            OSError: the disk is full, or fails.
        """
        features, coords = np.asarray(features), np.asarray(coords)
        rows = len(coords)
        if features.shape != (rows, self.embed_dim) or coords.shape != (rows, 2):
            raise ValueError(
                f"features of shape {features.shape} and coords of shape {coords.shape} do not fit: expected "
                f"(B, {self.embed_dim}) and (B, 2)"
            )
        if coords.dtype.kind not in "iu":
            raise ValueError(f"coords are {coords.dtype}, expected whole level-0 pixels (int64)")
        columns = {"features": self._store(features, "features"), "coords": coords.astype(np.int64, copy=False)}
        if (grid is not None) != (self.grid_shape is not None):
            raise ValueError(f"token maps (grid) are {'missing' if grid is None else 'not declared by grid_shape'}")
        if grid is not None and self.grid_shape is not None:
            columns["grid"] = self._store(_fit_grid(np.asarray(grid), (rows, *self.grid_shape)), "grid")
        self._rows.append(columns)
        self._disk.check()

    def append_bag(self, features: np.ndarray, coords: np.ndarray) -> None:
        """Add a bag of shared augmentation.

        Args:
            features: (n, D) of any float type, stored in the file's; n is the `bag_tiles` of the file.
            coords: (n, 2) of any integer type, of tiles of the slide.

        Raises:
            ValueError, OSError: as `append`.
        """
        features, coords = np.asarray(features), np.asarray(coords)
        if self._bags is None or features.ndim != 2 or len(features) != self._bags.row_shape(BAG_FEATURES)[0]:
            raise ValueError(f"a bag of features of shape {features.shape} does not fit what bag_tiles declares")
        if features.shape != (len(coords), self.embed_dim) or coords.shape[1:] != (2,) or coords.dtype.kind not in "iu":
            raise ValueError(f"a bag's features {features.shape} and coords {coords.shape} do not fit: (n, D), (n, 2)")
        stored = self._store(features, "features of a bag")
        self._bags.append({BAG_FEATURES: stored[None], BAG_COORDS: coords.astype(np.int64, copy=False)[None]})
        self._disk.check()

    def keep(self, name: str, source: Any) -> None:
        """Keep a data set or group of another open HDF5 file beside ours, as it is; readers of ours pass over it."""
        source.file.copy(source, self._file, name=name)

    def _store(self, values: np.ndarray, what: str) -> np.ndarray:
        if values.dtype.kind != "f":
            raise ValueError(f"{what} are {values.dtype}, expected floats")
        with np.errstate(over="ignore"):
            stored = values.astype(self._dtype, copy=False)
        if stored.dtype != values.dtype and np.isinf(stored).sum() != np.isinf(values).sum():
            raise ValueError(f"{what} exceed the range of {self._dtype}; store them with dtype float32")
        return stored


def _fit_grid(grid: np.ndarray, expected: tuple[int, ...]) -> np.ndarray:
    if grid.shape != expected:
        raise ValueError(f"token maps of shape {grid.shape} do not fit: expected {expected}")
    return grid


@contextlib.contextmanager
def write_slide_features(
    path: str | os.PathLike,
    embed_dim: int,
    *,
    coords_attributes: Mapping[str, Any],
    attributes: Mapping[str, Any],
    dtype: str = "float32",
    grid_shape: tuple[int, ...] | None = None,
    bag_tiles: int | None = None,
    overwrite: bool = False,
) -> Iterator[SlideFeatureWriter]:
    """Write a slide feature file batch by batch, whole or not at all (see `whole_file`), and read it back.

    The bytes depend on the rows and the attributes alone, not on how the rows are divided into batches.

    Args:
        path: the file to write.
        embed_dim: D, the length of a feature.
        coords_attributes: the geometry, all of `tile_geometry.GEOMETRY`; others are stored as well.
        attributes: the provenance; str, int, float and lists of them.
        dtype: "float32" or "float16", of features and token maps.
        grid_shape: (h, w) of the token maps, or (h, w, C) where their tokens are not D long; None stores none.
        bag_tiles: n, tiles of a bag of shared augmentation; None stores no bags. Bags are appended after all tiles.
        overwrite: whether an existing file may be replaced.

    Raises:
        ImportError: h5py is missing.
        OSError: the file cannot be written, or does not read back as written.
        ValueError: the geometry is incomplete or impossible, an attribute cannot be stored, or nothing was appended.

    Example:
        >>> with write_slide_features("s.h5", 512, coords_attributes=geometry, attributes=provenance) as writer:
        ...     writer.append(features, coords)
    """
    h5py = require_h5py()
    geometry = check_geometry(coords_attributes, os.fspath(path))
    stored_dtype = _stored_dtype(dtype)
    columns: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "features": ((embed_dim,), stored_dtype),
        "coords": ((2,), np.dtype(np.int64)),
    }
    if grid_shape is not None:
        grid_shape = (*grid_shape, embed_dim)[:3]
        columns["grid"] = (grid_shape, stored_dtype)
    with whole_file(path, overwrite) as part:
        with create_hdf5(part) as (file, disk):
            with stops_wait():
                writers = [rows := RowWriter(file, columns)]
                if bag_tiles is not None:
                    writers.append(RowWriter(file, _bag_columns(bag_tiles, embed_dim, stored_dtype)))
                write_attributes(file, attributes)
                write_attributes(file["coords"], geometry)
            yield SlideFeatureWriter(file, disk, rows, embed_dim, stored_dtype, grid_shape, *writers[1:])
            for writer in writers:
                writer.finish()
        if min(writer.count for writer in writers) == 0:
            what = "bag" if rows.count else "tile"
            raise ValueError(f"no {what} was appended, so {os.fspath(path)!r} is not made")
        with h5py.File(part, "r") as file:
            _check_layout(file, part.name)
            for writer in writers:
                writer.verify(file)


def _bag_columns(tiles: int, embed_dim: int, dtype: np.dtype) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {BAG_FEATURES: ((tiles, embed_dim), dtype), BAG_COORDS: ((tiles, 2), np.dtype(np.int64))}


def _stored_dtype(dtype: str) -> np.dtype:
    name = np.dtype(dtype).name if dtype in (np.float32, np.float16) else dtype
    if name not in _DTYPES:
        raise ValueError(f"features cannot be stored as {dtype!r}; choose float32 or float16")
    return np.dtype(_DTYPES[name])


class SlideFeatureFile(TileGeometry):
    """An open slide feature file whose features stay on the disk: for bags larger than memory.

    Attributes:
        features: (N, D); slices (`features[i0:i1]`) are read when they are asked for.
        coords: (N, 2) int64, in memory.
        coords_attributes, attributes: as `SlideFeatures`.
        grid: (N, h, w, D), sliced like `features`; None where there is none.
        bags: of shared augmentation, read one by one when they are asked for; None where there are none.
        file: the open `h5py.File`.
    """

    def __init__(self, file: Any, name: str) -> None:
        _check_layout(file, name)
        self.file = file
        self.features = file["features"]
        self.coords = file["coords"][:].astype(np.int64, copy=False)
        self.coords_attributes = check_geometry(plain_attributes(file["coords"]), name)
        self.attributes = plain_attributes(file)
        self.grid = file.get("grid")
        self.bags: FeatureBags | None = find_bags(file, name)

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.features.shape[1]

    def close(self) -> None:
        """Close the file; features and token maps cannot be read any more."""
        self.file.close()

    def __enter__(self) -> SlideFeatureFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_slide_features(path: str | os.PathLike) -> SlideFeatureFile:
    """Open a slide feature file without reading its features; close it, or use it in a `with` block.

    Raises:
        ImportError: h5py is missing.
        FileNotFoundError: the file does not exist.
        ValueError: it is not HDF5, is cut short, lacks a data set or a geometry attribute, its data sets disagree in
            length, or have the wrong type.
    """
    name = os.fspath(path)
    file = open_hdf5(name, _MAKER, _CURE)
    try:
        with damage_named(name, _CURE):
            return SlideFeatureFile(file, name)
    except BaseException:
        file.close()
        raise


def read_slide_features(
    path: str | os.PathLike, *, features: bool = True, grid: bool = False, bags: bool = False
) -> SlideFeatures:
    """Read a slide feature file into memory.

    Args:
        path: a file that `ssmamba extract`, `ssmamba convert` or `write_slide_features` wrote.
        features: whether to read the features; without them, reading takes no time.
        grid: whether to read the token maps, where the file has them (they are large).
        bags: whether to read the bags of shared augmentation, where the file has them (they are large too).

    Raises:
        As `open_slide_features`.
    """
    with open_slide_features(path) as file, damage_named(path, _CURE):
        return SlideFeatures(
            features=file.features[:] if features else None,
            coords=file.coords,
            coords_attributes=file.coords_attributes,
            attributes=file.attributes,
            grid=file.grid[:] if grid and file.grid is not None else None,
            bags=list(file.bags) if bags and file.bags is not None else None,
        )


def _check_layout(file: Any, name: str) -> None:
    _check_names(file, name)
    features, coords = file["features"], file["coords"]
    if features.ndim != 2:
        hint = "; TRIDENT's go through `ssmamba convert` first" if features.ndim == 3 else ""
        raise ValueError(f"{name!r}: features have shape {features.shape}, expected (N, D){hint}")
    rows = len(features)
    if rows == 0:
        raise ValueError(f"{name!r} has no tile; {_CURE}")
    if coords.shape != (rows, 2):
        raise ValueError(f"{name!r}: {rows} features, but coords of shape {coords.shape}, expected ({rows}, 2)")
    if coords.dtype.kind not in "iu":
        raise ValueError(f"{name!r}: coords are {coords.dtype}, expected int64")
    _check_floats(features, f"{name!r}: features")
    if "grid" in file:
        grid = file["grid"]
        if grid.ndim != 4 or len(grid) != rows:
            raise ValueError(f"{name!r}: grid has shape {grid.shape}, expected ({rows}, h, w, D)")
        _check_floats(grid, f"{name!r}: grid")
    find_bags(file, name)


def _check_names(file: Any, name: str) -> None:
    for required in ("features", "coords"):
        # A group has no shape.
        if not hasattr(file.get(required), "shape"):
            hint = "it is a tile-folder file of `ssmamba embed`" if "paths" in file else f"{_MAKER} did not make it"
            raise ValueError(
                f"{name!r} has no data set {required!r} (it has: {', '.join(sorted(file)) or 'none'}); {hint}"
            )


def _check_floats(dataset: Any, what: str) -> None:
    if dataset.dtype not in (np.float32, np.float16):
        raise ValueError(f"{what} are {dataset.dtype}, expected float32 or float16")
