"""Feature files: the features of N tiles in one HDF5 file that says where they come from.

Layout: `features` (N, D) float32, `paths` (N,) UTF-8 strings, `labels` (N,) UTF-8 strings where the tiles
have labels, and the provenance (model, weights, transform, versions) as attributes of the file. Nothing in it
depends on the time or the machine's paths, so the same input gives the same bytes.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# Rows per HDF5 chunk: large enough to read fast, small enough that a file of ten tiles stays small.
_CHUNK_ROWS = 256


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


def check_output(path: str | os.PathLike, overwrite: bool = False) -> Path:
    """Make sure, before a long run, that a file can be written at its end.

    Args:
        path: the file to be written; its folder must exist.
        overwrite: whether an existing file may be replaced.

    Returns:
        The path.

    Raises:
        FileExistsError: the file exists and may not be replaced.
        FileNotFoundError: its folder does not exist (no folder is created: it may be a misspelling).
        NotADirectoryError, IsADirectoryError, PermissionError, OSError: it cannot be written there.
    """
    out = Path(path)
    folder = out.parent
    if not folder.exists():
        raise FileNotFoundError(
            f"the output's folder {str(folder)!r} does not exist; create it (mkdir -p) or choose another"
        )
    if not folder.is_dir():
        raise NotADirectoryError(f"cannot write {str(out)!r}: {str(folder)!r} is a file, not a folder")
    if out.is_dir():
        raise IsADirectoryError(
            f"the output {str(out)!r} is a folder; name a file, such as {str(out / 'f.h5')!r}"
        )
    if out.exists() and not overwrite:
        raise FileExistsError(
            f"the output {str(out)!r} exists; replace it with --overwrite (overwrite=True) "
            "or choose another name"
        )
    _probe_writing(folder)
    return out


def _probe_writing(folder: Path) -> None:
    # Permission bits say too little (root, network mounts, read-only file systems): only writing tells.
    probe = folder / f".ssmamba-probe-{secrets.token_hex(4)}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise type(error)(
            f"cannot write in the output's folder {str(folder)!r} ({error.strerror}); choose a writable one"
        ) from error


class FeatureWriter:
    """Writes a feature file batch by batch, whole or not at all.

    A context manager. Rows go to a hidden file beside the output; on leaving the block that file is flushed,
    read back and renamed. If the block raises (Ctrl-C included), it is removed and an existing output is
    untouched.

    Args:
        path: the file to write.
        embed_dim: D, the length of a feature.
        labelled: whether the tiles have labels.
        attributes: the provenance; str, int, float and sequences of them.
        overwrite: whether an existing file may be replaced.

    Raises:
        ImportError: h5py is missing.
        OSError: as `check_output`, or writing fails.
        ValueError: a batch has another shape than its paths and labels, or no row was written.

    Example:
        >>> with FeatureWriter("f.h5", embed_dim=512, labelled=False, attributes={"model": "m"}) as writer:
        ...     writer.append(features, paths)
    """

    def __init__(
        self,
        path: str | os.PathLike,
        embed_dim: int,
        labelled: bool,
        attributes: Mapping[str, Any],
        overwrite: bool = False,
    ):
        self._h5py = require_h5py()
        self.path = check_output(path, overwrite)
        self.embed_dim = embed_dim
        self.labelled = labelled
        self.count = 0
        self._attributes = attributes
        self._overwrite = overwrite
        self._part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")

    def __enter__(self) -> FeatureWriter:
        try:
            self._file = self._h5py.File(self._part, "w-")
            self._create_datasets()
        except BaseException:
            self._discard()
            raise
        return self

    def _create_datasets(self) -> None:
        # Time stamps would make two runs differ.
        growing = {"track_times": False, "chunks": (_CHUNK_ROWS,), "maxshape": (None,)}
        text = self._h5py.string_dtype("utf-8")
        self._file.create_dataset(
            "features",
            shape=(0, self.embed_dim),
            maxshape=(None, self.embed_dim),
            chunks=(_CHUNK_ROWS, self.embed_dim),
            dtype=np.float32,
            track_times=False,
        )
        for name in ("paths", "labels") if self.labelled else ("paths",):
            self._file.create_dataset(name, shape=(0,), dtype=text, **growing)
        for name, value in sorted(self._attributes.items()):
            self._file.attrs[name] = value

    def append(self, features: np.ndarray, paths: Sequence[str], labels: Sequence[str] | None = None) -> None:
        """Add the features of B tiles.

        Args:
            features: (B, D), stored as float32.
            paths: B paths.
            labels: B class names; required if and only if the writer is `labelled`.
        """
        rows = len(paths)
        if features.shape != (rows, self.embed_dim):
            raise ValueError(f"features of shape {features.shape} do not fit {rows} paths x {self.embed_dim}")
        if (labels is not None) != self.labelled or (labels is not None and len(labels) != rows):
            raise ValueError(f"{rows} paths need {rows if self.labelled else 'no'} labels")
        columns = {"features": features, "paths": list(paths)}
        if labels is not None:
            columns["labels"] = list(labels)
        for name, values in columns.items():
            self._file[name].resize(self.count + rows, axis=0)
            self._file[name][self.count :] = values
        self.count += rows

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._publish()
        except BaseException:
            self._discard()
            raise

    def _publish(self) -> None:
        if self.count == 0:
            raise ValueError(f"no feature was written, so {str(self.path)!r} is not made")
        self._file.close()
        _sync(self._part)
        self._verify()
        if self.path.exists() and not self._overwrite:
            raise FileExistsError(
                f"the output {str(self.path)!r} appeared during the run; it is left as it is"
            )
        os.replace(self._part, self.path)

    def _verify(self) -> None:
        with self._h5py.File(self._part, "r") as file:
            _check_layout(file, str(self.path))
            written = file["features"].shape
        if written != (self.count, self.embed_dim):
            raise OSError(f"{str(self.path)!r} read back as {written}, not {(self.count, self.embed_dim)}")

    def _discard(self) -> None:
        try:
            # Closing writes what HDF5 still holds, and fails again on the full disk that brought us here.
            if getattr(self, "_file", None):
                self._file.close()
        except (OSError, RuntimeError):
            pass
        finally:
            self._part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


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
    h5py = require_h5py()
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(
            f"the feature file {name!r} does not exist (or is a folder); `ssmamba embed` makes one"
        )
    try:
        file = h5py.File(name, "r")
    except OSError as error:
        if error.errno is not None and not isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{name!r} is not an HDF5 file, or is cut short ({error}); embed again") from error
    with file:
        _check_layout(file, name)
        return TileFeatures(
            features=file["features"][:].astype(np.float32, copy=False),
            paths=file["paths"].asstr()[:].tolist(),
            labels=file["labels"].asstr()[:].tolist() if "labels" in file else None,
            attributes={key: _plain(value) for key, value in file.attrs.items()},
        )


def _check_layout(file, name: str) -> None:
    for required in ("features", "paths"):
        if required not in file:
            raise ValueError(
                f"{name!r} has no data set {required!r} (it has: {', '.join(sorted(file)) or 'none'}); "
                "it was not made by `ssmamba embed`"
            )
    if file["features"].ndim != 2:
        raise ValueError(f"{name!r}: features have shape {file['features'].shape}, expected (N, D)")
    rows = len(file["features"])
    for column in ("paths", "labels"):
        if column in file and file[column].shape != (rows,):
            raise ValueError(
                f"{name!r}: {rows} features, but {column} of shape {file[column].shape}; embed again"
            )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
