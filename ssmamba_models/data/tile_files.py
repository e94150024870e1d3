"""Tile-folder feature files: the features of N tiles in one HDF5 file that says where they come from.

Layout: `features` (N, D) float32, `paths` (N,) UTF-8 strings, `labels` (N,) UTF-8 strings where the tiles
have labels, and the provenance (model, weights, transform, versions) as attributes of the file. Nothing in it
depends on the time or the machine's paths, so the same input gives the same bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ssmamba_models.data.careful_file import CarefulFile, create_hdf5
from ssmamba_models.data.hdf5 import (
    CHUNK_ROWS,
    damage_named,
    open_hdf5,
    plain_attributes,
    require_h5py,
    write_attributes,
)
from ssmamba_models.output import whole_file
from ssmamba_models.stopping import stops_wait

_CURE = "embed again"


@dataclass(frozen=True)
class TileFeatures:
    """What a feature file holds.

    Attributes:
        features: (N, D) float32.
        paths: N tile paths, relative to the folder that was embedded.
        labels: N class names, or None.
        attributes: the provenance, name -> value.
    """

    features: np.ndarray
    paths: list[str]
    labels: list[str] | None
    attributes: dict[str, Any]


class FeatureWriter:
    """Appends batches of features to an open feature file; `write_features` makes one."""

    def __init__(self, file: Any, disk: CarefulFile, embed_dim: int, labelled: bool) -> None:
        self._file, self._disk = file, disk
        self.embed_dim = embed_dim
        self.labelled = labelled
        self.count = 0

    def append(self, features: np.ndarray, paths: Sequence[str], labels: Sequence[str] | None = None) -> None:
        """Add the features of B tiles.

        Args:
            features: (B, D), stored as float32.
            paths: B paths.
            labels: B class names; required if and only if the writer is `labelled`.

        Raises:
            ValueError: the three do not fit each other or the file.
            OSError: the disk is full, or fails.
        """
        rows = len(paths)
        if features.shape != (rows, self.embed_dim):
            raise ValueError(f"features of shape {features.shape} do not fit {rows} paths x {self.embed_dim}")
        if (labels is not None) != self.labelled or (labels is not None and len(labels) != rows):
            raise ValueError(f"{rows} paths need {rows if self.labelled else 'no'} labels")
        columns = {"features": features, "paths": list(paths)}
        if labels is not None:
            columns["labels"] = list(labels)
        with stops_wait():
            for name, values in columns.items():
                self._file[name].resize(self.count + rows, axis=0)
                self._file[name][self.count :] = values
        self.count += rows
        self._disk.check()


@contextlib.contextmanager
def write_features(
    path: str | os.PathLike,
    embed_dim: int,
    *,
    labelled: bool,
    attributes: Mapping[str, Any],
    overwrite: bool = False,
) -> Iterator[FeatureWriter]:
    """Write a feature file batch by batch, whole or not at all (see `whole_file`).

    Args:
        path: the file to write.
        embed_dim: D, the length of a feature.
        labelled: whether the tiles have labels.
        attributes: the provenance; str, int, float and sequences of them.
        overwrite: whether an existing file may be replaced.

    Raises:
        ImportError: h5py is missing.
        OSError: the file cannot be written, or does not read back as written.
        ValueError: nothing was appended.

    Example:
        >>> with write_features("f.h5", 512, labelled=False, attributes={"model": "m"}) as writer:
        ...     writer.append(features, paths)
    """
    h5py = require_h5py()
    with whole_file(path, overwrite) as part:
        with create_hdf5(part) as (file, disk):
            with stops_wait():
                _create_datasets(file, h5py, embed_dim, labelled)
                write_attributes(file, attributes)
            writer = FeatureWriter(file, disk, embed_dim, labelled)
            yield writer
        if writer.count == 0:
            raise ValueError(f"no feature was appended, so {os.fspath(path)!r} is not made")
        _verify(h5py, part, writer)


def _create_datasets(file: Any, h5py: ModuleType, embed_dim: int, labelled: bool) -> None:
    def create(name: str, width: tuple[int, ...], dtype: Any) -> None:
        file.create_dataset(
            name,
            shape=(0, *width),
            maxshape=(None, *width),
            chunks=(CHUNK_ROWS, *width),
            dtype=dtype,
            track_times=False,  # time stamps would make two runs differ
        )

    create("features", (embed_dim,), np.float32)
    create("paths", (), h5py.string_dtype("utf-8"))
    if labelled:
        create("labels", (), h5py.string_dtype("utf-8"))


def _verify(h5py: ModuleType, part: Path, writer: FeatureWriter) -> None:
    with h5py.File(part, "r") as file:
        _check_layout(file, part.name)
        written = file["features"].shape
    if written != (writer.count, writer.embed_dim):
        raise OSError(f"the feature file read back as {written}, not {(writer.count, writer.embed_dim)}")


def read_features(path: str | os.PathLike) -> TileFeatures:
    """Read a feature file.

    Args:
        path: a file that `ssmamba embed` (or `FeatureWriter`) wrote.

    Returns:
        Its features (N, D) float32, paths, labels and attributes.

    Raises:
        ImportError: h5py is missing.
        FileNotFoundError: the file does not exist.
        ValueError: it is not HDF5, lacks a data set, or its data sets disagree in length.
    """
    name = os.fspath(path)
    with open_hdf5(name, "`ssmamba embed`", _CURE) as file, damage_named(name, _CURE):
        _check_layout(file, name)
        return TileFeatures(
            features=file["features"][:].astype(np.float32, copy=False),
            paths=file["paths"].asstr()[:].tolist(),
            labels=file["labels"].asstr()[:].tolist() if "labels" in file else None,
            attributes=plain_attributes(file),
        )


def _check_layout(file: Any, name: str) -> None:
    for required in ("features", "paths"):
        # A group has no shape.
        if not hasattr(file.get(required), "shape"):
            raise ValueError(
                f"{name!r} has no data set {required!r} (it has: {', '.join(sorted(file)) or 'none'}); "
                "it was not made by `ssmamba embed`"
            )
    if file["features"].ndim != 2 or file["features"].dtype.kind != "f":
        found = f"{file['features'].dtype} of shape {file['features'].shape}"
        raise ValueError(f"{name!r}: features are {found}, expected (N, D) of float32")
    rows = len(file["features"])
    for column in ("paths", "labels"):
        if column in file and getattr(file[column], "shape", None) != (rows,):
            found = getattr(file[column], "shape", "no data set")
            raise ValueError(f"{name!r}: {rows} features, but {column} of shape {found}; {_CURE}")
