"""Slide vectors: one row for each slide, in one HDF5 file with the baselines that they are to be compared with.

Layout: `slides` (S,) UTF-8 names, `embeddings` (S, E) float32, `baselines/<name>` (S, E) float32 of the same slides,
and the provenance as attributes of the file. Nothing in it depends on the time or the machine's paths, so the same
features and weights give the same bytes. Vectors from elsewhere are read from a plain .npy with a list of ids.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssmamba_models.data.careful_file import create_hdf5
from ssmamba_models.data.csv_rows import column_places, read_csv_rows
from ssmamba_models.data.hdf5 import damage_named, open_hdf5, plain_attributes, require_h5py, write_attributes
from ssmamba_models.output import whole_file
from ssmamba_models.stopping import stops_wait

_MAKER, _CURE = "`ssmamba slide-embed`", "embed the slides again"
_ID_COLUMNS = ("slide", "id", "name")


@dataclass(frozen=True)
class SlideVectors:
    """Vectors of slides.

    Attributes:
        slides: S names.
        embeddings: (S, E) float32.
        baselines: name -> (S, E) float32: what the vectors are to be compared with.
        attributes: the provenance, name -> value.

    Raises:
        ValueError: lengths that differ, a name twice, or values that are not finite.
    """

    slides: tuple[str, ...]
    embeddings: np.ndarray
    baselines: Mapping[str, np.ndarray] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in {"embeddings": self.embeddings, **self.baselines}.items():
            if values.ndim != 2 or len(values) != len(self.slides):
                raise ValueError(
                    f"{name} have shape {values.shape}, expected a row for each of {len(self.slides)} slides"
                )
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                slide = self.slides[int(np.argmin(finite))]
                raise ValueError(f"{name} of the slide {slide!r} are NaN or infinite; {_CURE}, or leave it out")
        seen: set[str] = set()
        for slide in self.slides:
            if slide in seen:
                raise ValueError(f"the slide {slide!r} is there twice; a slide has one vector")
            seen.add(slide)


def write_slide_vectors(path: str | os.PathLike, vectors: SlideVectors, overwrite: bool = False) -> None:
    """Write slide vectors, whole or not at all.

    Raises:
        ImportError: h5py is missing.
        OSError: the file cannot be written, or exists and may not be replaced.
    """
    h5py = require_h5py()
    columns = {"embeddings": vectors.embeddings}
    columns |= {f"baselines/{name}": values for name, values in sorted(vectors.baselines.items())}
    with whole_file(path, overwrite) as part, create_hdf5(part) as (file, disk), stops_wait():
        for name, values in columns.items():
            file.create_dataset(name, data=values.astype(np.float32), track_times=False)
        text = h5py.string_dtype()
        file.create_dataset("slides", data=list(vectors.slides), dtype=text, track_times=False)
        write_attributes(file, vectors.attributes)
        disk.check()


def read_slide_vectors(path: str | os.PathLike, ids: str | os.PathLike | None = None) -> SlideVectors:
    """Read slide vectors.

    Args:
        path: a file of `ssmamba slide-embed`, or a .npy file of (S, E) numbers.
        ids: for a .npy file, the S names: a text file with one in each line, or a CSV with a column slide (or id).

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is damaged or of another kind, ids are missing or too many, or as `SlideVectors`.
        ImportError: h5py is missing.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return _read_npy(path, ids)
    if ids is not None:
        raise ValueError(f"{str(path)!r} is no .npy file; --ids belongs to those, {_MAKER} stores the names itself")
    with open_hdf5(path, _MAKER, _CURE) as file, damage_named(path, _CURE):
        embeddings = _column(path, file, "embeddings", "fiu", 2)
        names = tuple(name.decode("utf-8") for name in _column(path, file, "slides", "OS", 1))
        baselines = file.get("baselines", {})
        if not isinstance(baselines, Mapping):
            raise ValueError(f"{str(path)!r}: baselines is no group; expected a file of {_MAKER}")
        baselines = {name: _column(path, file, f"baselines/{name}", "fiu", 2) for name in baselines}
        return _named(path, names, embeddings, baselines, plain_attributes(file))


def _column(path: Path, file: Any, name: str, kinds: str, dims: int) -> np.ndarray:
    """A data set with so many axes, of one of numpy's kinds of types."""
    if name not in file:
        raise ValueError(
            f"{str(path)!r} has no data set {name!r} (it has: {', '.join(sorted(file)) or 'none'}); expected "
            f"a file of {_MAKER}"
        )
    values = file[name]
    # A group has no shape.
    if not hasattr(values, "shape") or len(values.shape) != dims or values.dtype.kind not in kinds:
        found = f"{values.dtype} of shape {values.shape}" if hasattr(values, "shape") else "a group"
        raise ValueError(
            f"{str(path)!r}: {name} is {found}, expected {'names (S,)' if dims == 1 else 'numbers (S, E)'}, as in a "
            f"file of {_MAKER}"
        )
    return values[:]


def _named(path: Path, *fields: Any) -> SlideVectors:
    try:
        return SlideVectors(*fields)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def _read_npy(path: Path, ids: str | os.PathLike | None) -> SlideVectors:
    if not path.is_file():
        raise FileNotFoundError(f"the embeddings {str(path)!r} do not exist")
    if ids is None:
        raise ValueError(f"{str(path)!r} does not say whose vectors it holds; name its rows with --ids FILE")
    try:
        # A pickle could run code.
        values = np.load(path, allow_pickle=False)
    except MemoryError as error:
        raise ValueError(f"{str(path)!r} does not fit into memory ({error}), or is damaged") from error
    # A broken header makes numpy raise what Python's own parser raises: TokenError, SyntaxError and others.
    except Exception as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{str(path)!r} is no .npy file of numbers ({error}); save it with numpy.save") from error
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{str(path)!r} is an archive (.npz), expected one array; save it with numpy.save")
    if values.ndim != 2 or values.dtype.kind not in "fiu" or values.shape[1] == 0:
        raise ValueError(f"{str(path)!r} holds {values.dtype} of shape {values.shape}, expected numbers (S, E)")
    names = read_ids(ids)
    if len(names) != len(values):
        raise ValueError(f"{os.fspath(ids)!r} names {len(names)} slides, and {str(path)!r} has {len(values)} rows")
    with np.errstate(over="ignore"):  # what is infinite is refused by name
        return _named(path, names, values.astype(np.float32))


def read_ids(path: str | os.PathLike) -> tuple[str, ...]:
    """Read the names of rows: one in each line of a text file, or the column slide (or id, name) of a CSV.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not UTF-8, has no name, or as a CSV no such column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the list of ids {str(path)!r} does not exist (or is a folder)")
    if path.suffix.lower() == ".csv":
        return _read_id_column(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 ({error.reason})") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ValueError(f"{str(path)!r} names no slide; expected one in each line")
    return names


def _read_id_column(path: Path) -> tuple[str, ...]:
    header, rows = read_csv_rows(path, "slide")
    columns = column_places(path, header, _ID_COLUMNS)
    place = next((columns[name] for name in _ID_COLUMNS if name in columns), None)
    if place is None:
        raise ValueError(f"{str(path)!r} has the columns {', '.join(header)}; expected one of {', '.join(_ID_COLUMNS)}")
    return tuple(fields[place].strip() for _, fields in rows)
