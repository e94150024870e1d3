"""Feature files of other tools: what stands in them, what is missing, and how nothing is lost between them and ours.

A field that the other side has no place for travels as an attribute with a prefix, which that side ignores:
`clam.downsample` on ours is CLAM's `downsample`, `ssmamba.level0_mpp` on CLAM's is our `level0_mpp`. Going back,
prefixed attributes become what they were, with their types. Attributes that a layout needs and ours only implies
(CLAM's `patch_level`) are made, and listed in `ssmamba.made`, so that they are not taken for the tool's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssmamba_models.data.careful_file import create_hdf5
from ssmamba_models.data.feature_source import FeatureSource, other_datasets, with_model
from ssmamba_models.data.geometry_completion import complete_geometry
from ssmamba_models.data.hdf5 import plain, raw_attributes, require_h5py, row_blocks, write_attributes
from ssmamba_models.data.tile_geometry import GEOMETRY
from ssmamba_models.stopping import stops_wait

_OURS = "ssmamba."
_MADE = "ssmamba.made"
_OUR_DTYPE = "ssmamba.features_dtype"

@dataclass(frozen=True)
class Layout:
    """What a foreign layout calls itself and how it stores.

    Attributes:
        name: the prefix of its attributes in our files.
        features_dtype: the type of its features; None keeps that of the source.
        coords_dtype: the type of its coordinates.
    """

    name: str
    features_dtype: str | None
    coords_dtype: str

    def default_storage(self, dtype: np.dtype) -> dict[str, list]:
        """Type and number of axes of each data set, for features that are `dtype` in ours."""
        return {"features": [self.features_dtype or dtype.name, 2], "coords": [self.coords_dtype, 2]}


class _WithoutLeadingAxis:
    """Rows of a data set of shape (1, N, D)."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.shape = dataset.shape[1:]
        self.dtype = dataset.dtype

    def __getitem__(self, rows: Any) -> Any:
        return self._dataset[0, rows]


def rows_of(file: Any, name: str, where: str) -> Any:
    """A data set of a foreign file as (N, ...), also where it is stored as (1, N, ...).

    Raises:
        ValueError: it is missing, has no row, or another shape.
    """
    dataset = file.get(name)
    if not hasattr(dataset, "shape"):
        raise ValueError(f"{where} has no data set {name!r} (it has: {', '.join(sorted(file)) or 'none'})")
    rows = _WithoutLeadingAxis(dataset) if dataset.ndim == 3 and dataset.shape[0] == 1 else dataset
    if len(rows.shape) != 2:
        raise ValueError(f"{where}: {name} have shape {dataset.shape}, expected (N, D) or (1, N, D)")
    if rows.shape[0] == 0:
        raise ValueError(f"{where} has no tile")
    return rows


def read_coords(file: Any, where: str) -> np.ndarray:
    """The coordinates of a foreign file as (N, 2) int64.

    Raises:
        ValueError: they have another shape, or are no whole numbers.
    """
    stored = rows_of(file, "coords", where)[:]
    if stored.shape[1] != 2 or stored.dtype.kind not in "iuf":
        raise ValueError(f"{where}: coords are {stored.dtype} of shape {stored.shape}, expected numbers (N, 2)")
    coords = stored.astype(np.int64)
    if not np.array_equal(coords, stored):
        raise ValueError(f"{where}: coords are no whole numbers, expected level-0 pixels")
    return coords


def source_of_foreign(
    file: Any, layout: Layout, where: str, stated: Mapping[str, Any], given: Mapping[str, Any], model: str | None
) -> FeatureSource:
    """A foreign open HDF5 file as a source.

    Args:
        file: the open `h5py.File`, with `features` and `coords`.
        layout: its layout.
        where: the file, for messages.
        stated: the geometry as the file states it, in our names; not asked for where the file was made from ours.
        given: what the user says of the slide.
        model: the encoder's name as the layout states it.

    Raises:
        ValueError: the data sets do not fit, or the geometry is incomplete or contradicts what was given.
    """
    features, coords = rows_of(file, "features", where), read_coords(file, where)
    if features.dtype not in (np.float32, np.float16):
        raise ValueError(f"{where}: features are {features.dtype}, expected float32 or float16")
    if len(coords) != features.shape[0]:
        raise ValueError(f"{where}: {features.shape[0]} features, but {len(coords)} coords")
    features_raw, coords_raw = raw_attributes(file["features"]), raw_attributes(file["coords"])
    dtype = np.dtype(plain(features_raw.pop(_OUR_DTYPE, features.dtype.name)))
    coords_attributes = _to_ours(coords_raw, f"{layout.name}.")
    attributes = {
        **_to_ours(raw_attributes(file), f"{layout.name}.file."),
        **_to_ours(features_raw, f"{layout.name}.features."),
    }
    if f"{_OURS}patch_size" in coords_raw:  # made from ours: what ours said goes before what the layout says
        stated = {name: plain(coords_attributes[name]) for name in GEOMETRY if name in coords_attributes}
    else:
        attributes = with_model({"converted_from": layout.name, **attributes}, model, where)
    attributes |= _unusual_storage(layout, file, dtype)
    return FeatureSource(
        where=where,
        features=features,
        dtype=dtype,
        embed_dim=features.shape[1],
        coords=coords,
        coords_attributes={**coords_attributes, **complete_geometry(stated, given, where)},
        attributes=with_model(attributes, given.get("model"), where),
        grid=_token_maps(file, where, len(coords)),
        others=other_datasets(file),
    )


def write_foreign(
    source: FeatureSource,
    part: Path,
    layout: Layout,
    native_coords: Mapping[str, Any],
    native_features: Mapping[str, Any],
) -> None:
    """Write a source as a new HDF5 file of a foreign layout, and read it back.

    Args:
        source: what to write.
        part: the file, which must not exist.
        layout: the layout.
        native_coords, native_features: the attributes that the layout has on its data sets, made from ours; those
            that were remembered go before.

    Raises:
        OSError: the file does not read back as written.
        ValueError: a coordinate does not fit the layout's type.
    """
    h5py = require_h5py()
    attributes = dict(source.attributes)
    remembered = json.loads(plain(attributes.pop(f"{layout.name}.storage", "{}")))
    storage = {**layout.default_storage(source.dtype), **remembered}
    with create_hdf5(part) as (file, _):
        for name, (rows, how) in _columns(source, storage).items():
            _write_rows(file, name, rows, *how)
        with stops_wait():
            for name, other in source.others.items():
                other.file.copy(other, file, name=name)
            _write_foreign_attributes(file, source, attributes, layout, native_coords, native_features)
            if source.dtype.name != storage["features"][0]:
                file["features"].attrs[_OUR_DTYPE] = source.dtype.name
    with h5py.File(part, "r") as file:
        for name, (rows, how) in _columns(source, storage).items():
            _verify_rows(file, name, rows, *how)


def _columns(source: FeatureSource, storage: Mapping[str, list]) -> dict[str, tuple[Any, list]]:
    columns = {
        "features": (source.features, storage["features"]),
        "coords": (_fit(source.coords, storage["coords"][0], source.where), storage["coords"]),
    }
    if source.grid is not None:
        columns["grid"] = (source.grid, [source.dtype.name, 4])
    return columns


def _write_foreign_attributes(
    file: Any, source: FeatureSource, attributes: dict, layout: Layout, native_coords: Mapping, native_features: Mapping
) -> None:
    on_features = f"{layout.name}.features."
    features_raw = {key: attributes.pop(key) for key in list(attributes) if key.startswith(on_features)}
    write_attributes(file["coords"], _from_ours(source.coords_attributes, f"{layout.name}.", native_coords))
    write_attributes(file["features"], _from_ours(features_raw, on_features, native_features))
    write_attributes(file, _from_ours(attributes, f"{layout.name}.file.", {}))


def _to_ours(raw: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    made = set(plain(raw.get(_MADE, [])))
    ours = {key.removeprefix(_OURS): value for key, value in raw.items() if key.startswith(_OURS) and key != _MADE}
    theirs = {key: value for key, value in raw.items() if not key.startswith(_OURS) and key not in made}
    return {**ours, **{prefix + key: value for key, value in theirs.items()}}


def _from_ours(ours: Mapping[str, Any], prefix: str, native: Mapping[str, Any]) -> dict[str, Any]:
    theirs = {}
    for key, value in ours.items():
        theirs[key.removeprefix(prefix) if key.startswith(prefix) else _OURS + key] = value
    made = {key: value for key, value in native.items() if key not in theirs}
    return {**theirs, **made, **({_MADE: sorted(made)} if made else {})}


def _unusual_storage(layout: Layout, file: Any, dtype: np.dtype) -> dict[str, str]:
    default = layout.default_storage(dtype)
    unusual = {
        name: [file[name].dtype.name, file[name].ndim]
        for name in default
        if [file[name].dtype.name, file[name].ndim] != default[name]
    }
    return {f"{layout.name}.storage": json.dumps(unusual, sort_keys=True)} if unusual else {}


def _write_rows(file: Any, name: str, rows: Any, dtype: str, axes: int) -> None:
    leading = (1,) * (axes - len(rows.shape))
    count, *width = rows.shape
    row_bytes = math.prod(width) * np.dtype(dtype).itemsize
    chunk = (*leading, min(count, max(1, (1 << 20) // row_bytes)), *width)
    with stops_wait():
        dataset = file.create_dataset(name, (*leading, *rows.shape), dtype, chunks=chunk, track_times=False)
    for block in row_blocks(count, row_bytes):
        values = rows[block].astype(dtype, copy=False)
        with stops_wait():
            dataset[(*(0 for _ in leading), block)] = values
    with stops_wait():
        del dataset  # writes what HDF5 still holds of it


def _verify_rows(file: Any, name: str, rows: Any, dtype: str, axes: int) -> None:
    dataset = file[name]
    for block in row_blocks(rows.shape[0], math.prod(rows.shape[1:]) * np.dtype(dtype).itemsize):
        written = dataset[(*(0 for _ in range(axes - len(rows.shape))), block)]
        if written.tobytes() != rows[block].astype(dtype, copy=False).tobytes():
            raise OSError(f"{name} did not read back as written; the disk or the memory may be faulty")


def _fit(coords: np.ndarray, dtype: str, where: str) -> np.ndarray:
    stored = coords.astype(dtype)
    if not np.array_equal(stored.astype(np.int64), coords):
        raise ValueError(f"{where}: coords up to {coords.max()} do not fit the layout's {dtype}")
    return stored


def _token_maps(file: Any, where: str, rows: int) -> Any:
    grid = file.get("grid")
    if grid is not None and (getattr(grid, "ndim", 0) != 4 or len(grid) != rows or grid.dtype.kind != "f"):
        raise ValueError(f"{where}: its data set grid is no token maps ({rows}, h, w, D), and ours has no other place")
    return grid
