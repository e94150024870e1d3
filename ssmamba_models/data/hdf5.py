"""HDF5 as all feature files use it: opened with plain errors, rows appended in fixed steps, attributes sorted."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ssmamba_models.data.folder_walk import walk_folder
from ssmamba_models.notice import one_line
from ssmamba_models.stopping import stops_wait

# Rows per HDF5 chunk: large enough to read fast, small enough that a file of ten tiles stays small.
CHUNK_ROWS = 256
# A chunk of wide rows (token maps) must still fit into memory many times over.
_CHUNK_BYTES = 1 << 20


def require_h5py() -> ModuleType:
    """Import h5py, which only feature files need.

    Raises:
        ImportError: h5py is missing or broken; the message names the extra that installs it.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f'feature files need h5py ({error}); install it with: pip install "ssmamba-models[wsi]"'
        ) from error
    return h5py


def open_hdf5(path: str | os.PathLike, maker: str, cure: str) -> Any:
    """Open an HDF5 file for reading.

    Args:
        path: the file.
        maker: what makes such files, for the message where there is none ("`ssmamba embed`").
        cure: what to do where the file is broken ("embed again").

    Returns:
        The open `h5py.File`.

    Raises:
        ImportError: h5py is missing.
        FileNotFoundError: the file does not exist.
        ValueError: it is not HDF5, or is cut short.
        OSError: it cannot be read.
    """
    h5py = require_h5py()
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"the feature file {name!r} does not exist (or is a folder); {maker} makes one")
    try:
        return h5py.File(name, "r")
    except OSError as error:
        if error.errno is not None and not isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{name!r} is not an HDF5 file, or is cut short ({error}); {cure}") from error


@contextlib.contextmanager
def damage_named(path: str | os.PathLike, cure: str) -> Iterator[None]:
    """Turn what h5py raises where a file is broken within into a ValueError that names the file.

    HDF5 has no checksums of its own structures, so anything may stand in them, and h5py raises KeyError, RuntimeError,
    TypeError, UnicodeDecodeError and others.

    Args:
        path: the file.
        cure: as `open_hdf5`.

    Raises:
        ValueError: anything was raised in the block; errors that name the file already, and missing files and packages,
            stay as they are.
    """
    name = repr(os.fspath(path))
    try:
        yield
    except (ImportError, FileNotFoundError):
        raise
    except MemoryError as error:
        raise ValueError(f"{name} does not fit into memory ({error}), or is damaged; {cure}") from error
    except Exception as error:
        if isinstance(error, ValueError) and os.fspath(path) in str(error):
            raise
        raise ValueError(f"{name} is damaged ({one_line(error)}); {cure}") from error


def plain(value: Any) -> Any:
    """An attribute's value as Python has it: numbers, strings, lists of them."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def plain_attributes(owner: Any) -> dict[str, Any]:
    """All attributes of a file or data set, name -> plain value."""
    return {name: plain(value) for name, value in owner.attrs.items()}


def raw_attributes(owner: Any) -> dict[str, Any]:
    """All attributes of a file or data set with their HDF5 types (float64, int32, ...), to be written as they were."""
    raw = {}
    for name, value in owner.attrs.items():
        # h5py reads arrays of strings as objects, and writes only lists of them.
        raw[name] = value.tolist() if isinstance(value, np.ndarray) and value.dtype == object else value
    return raw


def write_attributes(owner: Any, attributes: Mapping[str, Any]) -> None:
    """Set attributes of a file or data set, in sorted order, so that two writes give the same bytes.

    Raises:
        ValueError: a value is of a type that HDF5 attributes cannot hold, or longer than 64 kB.
    """
    for name, value in sorted(attributes.items()):
        try:
            owner.attrs[name] = value
        except (TypeError, ValueError, OSError, RuntimeError) as error:
            raise ValueError(
                f"the attribute {name!r} cannot be stored ({error}); give a str, a number, or a list of them, "
                "below 64 kB"
            ) from error


class RowWriter:
    """Appends rows to data sets of one length, in steps that do not depend on how the rows arrive.

    HDF5 places chunks in the order in which they are first written. Writing equal steps in a fixed order is what
    makes two files of the same rows equal to the byte, whatever the batches were.

    Args:
        file: an open, writable `h5py.File` without data sets of these names.
        columns: name -> (shape of a row, dtype).
    """

    def __init__(self, file: Any, columns: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        self.count = 0
        self._datasets = {name: _create(file, name, *column) for name, column in columns.items()}
        self._step = min(dataset.chunks[0] for dataset in self._datasets.values())
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in columns}
        self._waiting_rows = 0
        self._sums = dict.fromkeys(columns, 0)

    def row_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a row of a data set."""
        return self._datasets[name].shape[1:]

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add B rows to every data set: name -> (B, ...) of the data set's dtype."""
        rows = len(next(iter(columns.values())))
        for start in range(0, rows, self._step):
            self._take({name: values[start : start + self._step] for name, values in columns.items()})
        self.count += rows

    def finish(self) -> None:
        """Write the rows that wait for a full step."""
        if self._waiting_rows:
            self._write(self._collect())

    def _take(self, columns: Mapping[str, np.ndarray]) -> None:
        for name, values in columns.items():
            # A copy: the caller may fill the same memory with the next batch.
            self._waiting[name].append(np.array(values))
        self._waiting_rows += len(next(iter(columns.values())))
        if self._waiting_rows < self._step:
            return
        joined = self._collect()
        self._write({name: values[: self._step] for name, values in joined.items()})
        rest = {name: values[self._step :] for name, values in joined.items()}
        self._waiting_rows = len(next(iter(rest.values())))
        for name, values in rest.items():
            self._waiting[name] = [values]

    def _collect(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self._waiting.items()}

    def _write(self, columns: Mapping[str, np.ndarray]) -> None:
        for name, values in columns.items():
            dataset = self._datasets[name]
            start = len(dataset)
            with stops_wait():
                dataset.resize(start + len(values), axis=0)
                dataset[start:] = values
            self._sums[name] = zlib.crc32(np.ascontiguousarray(values).data, self._sums[name])

    def verify(self, file: Any) -> None:
        """Compare a re-opened file with what was written.

        Raises:
            OSError: a data set reads back different.
        """
        for name, expected in self._sums.items():
            dataset = file[name]
            found = 0
            for start in range(0, len(dataset), self._step):
                found = zlib.crc32(np.ascontiguousarray(dataset[start : start + self._step]).data, found)
            if len(dataset) != self.count or found != expected:
                raise OSError(f"{name} did not read back as written; the disk or the memory may be faulty")


def _create(file: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    row_bytes = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
    fitting = max(1, _CHUNK_BYTES // max(row_bytes, 1))
    rows = min(CHUNK_ROWS, 1 << (fitting.bit_length() - 1)) if len(shape) > 1 else CHUNK_ROWS
    return file.create_dataset(
        name,
        shape=(0, *shape),
        maxshape=(None, *shape),
        chunks=(rows, *shape),
        dtype=dtype,
        track_times=False,  # time stamps would make two runs differ
    )


def row_blocks(rows: int, row_bytes: int, block_bytes: int = 8 << 20) -> Iterator[slice]:
    """Slices that cover `rows` rows, each of about `block_bytes`: what walks a bag larger than memory."""
    step = max(1, block_bytes // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def hdf5_files(path: Path, suffixes: Sequence[str] = (".h5",)) -> list[Path]:
    """The HDF5 files that a path names: itself, or those in the folder, at any depth; sorted.

    Hidden files and folders are left out, links to folders followed.

    Raises:
        FileNotFoundError: there is no such path.
        OSError: a folder cannot be listed.
        ValueError: the folder holds none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} does not exist; check its spelling")
    files = (folder / name for folder, names in walk_folder(path) for name in names)
    found = sorted(file for file in files if file.suffix.lower() in suffixes and file.is_file())
    if not found:
        raise ValueError(f"no {' or '.join(suffixes)} file found in {str(path)!r} or below")
    return found
