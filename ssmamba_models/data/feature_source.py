"""A slide's features on their way from one layout to another, and our own layout as start and end of the way."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssmamba_models.data.features import SlideFeatureFile, write_slide_features
from ssmamba_models.data.hdf5 import plain, raw_attributes, row_blocks
from ssmamba_models.data.tile_geometry import GEOMETRY

_DATASETS = ("features", "coords", "grid")


@dataclass
class FeatureSource:
    """A slide's features in our terms; the file behind them must stay open.

    Attributes:
        where: the file, for messages.
        features: gives (n, D) for a slice.
        dtype: of the features in our file.
        embed_dim: D.
        coords: (N, 2) int64.
        coords_attributes: our geometry, and the prefixed attributes of other layouts.
        attributes: our provenance, and the prefixed attributes of other layouts.
        grid: gives (n, h, w, D) for a slice, and has a shape; or None.
        others: data sets and groups that neither layout knows, name -> HDF5 object.
    """

    where: str
    features: Any
    dtype: np.dtype
    embed_dim: int
    coords: np.ndarray
    coords_attributes: dict[str, Any]
    attributes: dict[str, Any]
    grid: Any = None
    others: dict[str, Any] = field(default_factory=dict)

    def blocks(self) -> Iterator[slice]:
        """Slices over the rows, each small enough for the memory."""
        width = self.embed_dim if self.grid is None else self.embed_dim + math.prod(self.grid.shape[1:])
        return row_blocks(len(self.coords), 4 * width)

    @property
    def model(self) -> str | None:
        """The encoder's name, where the provenance has it."""
        return plain(self.attributes.get("model"))


def source_of_ours(file: SlideFeatureFile, where: str, model: str | None) -> FeatureSource:
    """Our own open file as a source."""
    return FeatureSource(
        where=where,
        features=file.features,
        dtype=file.features.dtype,
        embed_dim=file.embed_dim,
        coords=file.coords,
        coords_attributes={**raw_attributes(file.file["coords"]), **{name: getattr(file, name) for name in GEOMETRY}},
        attributes=with_model(raw_attributes(file.file), model, where),
        grid=file.grid,
        others=other_datasets(file.file),
    )


def write_ours(source: FeatureSource, out: str | os.PathLike, overwrite: bool) -> None:
    """Write a source as our slide feature file."""
    grid_shape = None if source.grid is None else source.grid.shape[1:]
    with write_slide_features(
        out,
        source.embed_dim,
        coords_attributes=source.coords_attributes,
        attributes=source.attributes,
        dtype=source.dtype.name,
        grid_shape=grid_shape,
        overwrite=overwrite,
    ) as writer:
        for block in source.blocks():
            grid = None if source.grid is None else source.grid[block]
            writer.append(source.features[block], source.coords[block], grid)
        for name, other in source.others.items():
            writer.keep(name, other)


def other_datasets(file: Any) -> dict[str, Any]:
    """The data sets and groups of an open HDF5 file that no layout knows."""
    return {name: file[name] for name in sorted(file) if name not in _DATASETS}


def with_model(attributes: dict[str, Any], model: str | None, where: str) -> dict[str, Any]:
    """The provenance with the encoder's name, which may be None.

    Raises:
        ValueError: it has another name already.
    """
    stated = plain(attributes.get("model"))
    if stated is not None and model is not None and stated != model:
        raise ValueError(f"{where} says that the model is {stated!r}, not {model!r}; leave --model out")
    return attributes if model is None else {**attributes, "model": model}
