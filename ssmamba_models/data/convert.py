"""Feature files of CLAM and TRIDENT to ours, and back, without loss: a file or a folder of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmamba_models.choices import FEATURE_LAYOUTS
from ssmamba_models.data.clam import H5_FOLDER, read_clam, tensor_file, write_clam
from ssmamba_models.data.feature_source import FeatureSource, source_of_ours, write_ours
from ssmamba_models.data.features import open_slide_features
from ssmamba_models.data.hdf5 import hdf5_files, require_h5py
from ssmamba_models.data.trident import FOLDER, read_trident, write_trident
from ssmamba_models.output import check_output


@dataclass(frozen=True)
class ConvertSummary:
    """What `convert_features` did.

    Attributes:
        written: (source, output) of each converted file.
        failed: (source, reason) of each file that could not be converted; nothing was written for it.
    """

    written: list[tuple[Path, Path]]
    failed: list[tuple[Path, str]]


def convert_features(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    source_layout: str,
    target_layout: str,
    given: Mapping[str, Any] | None = None,
    table: Mapping[str, Mapping[str, Any]] | None = None,
    coords: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> ConvertSummary:
    """Convert slide feature files from one layout to another.

    What the other layout has no field for is stored as attributes that its tools pass over, so the way back gives equal
    features, coordinates and attributes. A file that cannot be converted never stops the others.

    Args:
        source: a file, or a folder: of ours, with `h5_files` (CLAM), or with `features_<encoder>` (TRIDENT), at any
            depth.
        out: the folder to write, made where it is missing. It gets the source's folders; in them CLAM's `h5_files` and
            `pt_files`, or TRIDENT's `features_<encoder>`.
        source_layout, target_layout: "ssmamba", "clam" or "trident".
        given: what foreign files do not say, for all slides: any of `tile_geometry.GEOMETRY`, and "model".
        table: the same for each slide, slide name -> what is given; goes before `given`.
        coords: CLAM's folder of coordinate files (`patches`), which say how large the tiles are.
        overwrite: whether existing outputs may be replaced.

    Returns:
        What was written, and what failed.

    Raises:
        ValueError: unknown or equal layouts, no file found, or an option that the source's layout has no use for.
        OSError: the source does not exist, or the output is no folder.
        ImportError: h5py is missing.
    """
    require_h5py()
    _check_layouts(source_layout, target_layout)
    given, table = given or {}, table or {}
    coords = None if coords is None else Path(coords)
    _check_given(source_layout, given, table, coords)
    root, files = Path(source), _find(Path(source), source_layout)
    folder = _make_folder(Path(out))
    written, failed = [], []
    taken: dict[Path, Path] = {}
    for file in files:
        try:
            with _open(file, source_layout, {**given, **table.get(file.stem, {})}, coords) as features:
                place = _output(folder, root, file, target_layout, features)
                if place in taken:
                    raise ValueError(f"its output {str(place)!r} is already that of {str(taken[place])!r}")
                if place.resolve() == file.resolve():
                    raise ValueError("its output would take its own place; choose another --out")
                _write(features, place, target_layout, overwrite)
        # The last ones: HDF5 broken within, which may tell of more rows than any memory holds.
        except (ValueError, OSError, KeyError, RuntimeError, TypeError, MemoryError) as error:
            failed.append((file, str(error) or type(error).__name__))
        else:
            taken[place] = file
            written.append((file, place))
    return ConvertSummary(written, failed)


def _check_layouts(source: str, target: str) -> None:
    for layout in (source, target):
        if layout not in FEATURE_LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; choose {', '.join(FEATURE_LAYOUTS)}")
    if source == target:
        raise ValueError(f"both layouts are {source!r}; there is nothing to convert")


def _check_given(layout: str, given: Mapping[str, Any], table: Mapping[str, Any], coords: Path | None) -> None:
    if layout == "ssmamba" and (table or set(given) - {"model"}):
        raise ValueError("our own files say how large their tiles are; only --model can be given for them")
    if coords is not None and layout != "clam":
        raise ValueError(f"coordinate files (--coords) are CLAM's; files of {layout} hold what they say")
    if coords is not None and not coords.exists():
        raise FileNotFoundError(f"the coordinate files (--coords) {str(coords)!r} do not exist; check the spelling")


def _find(root: Path, layout: str) -> list[Path]:
    if root.is_file():
        if root.suffix == ".pt":
            raise ValueError(f"{str(root)!r} has no coordinates; give the .h5 file beside it, in {H5_FOLDER}")
        return [root]
    found = hdf5_files(root)
    if layout == "clam":
        found = _in_folders(found, lambda name: name == H5_FOLDER)
    elif layout == "trident":
        found = _in_folders(found, lambda name: name.startswith(FOLDER))
    return found


def _in_folders(files: list[Path], belongs: Callable[[str], bool]) -> list[Path]:
    # A job folder also holds coordinates and slide features; a folder of features alone may have any name.
    return [file for file in files if belongs(file.parent.name)] or files


def _make_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"the output {str(folder)!r} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _open(file: Path, layout: str, given: Mapping[str, Any], coords: Path | None) -> Iterator[FeatureSource]:
    if layout == "clam":
        with read_clam(file, given, coords) as source:
            yield source
    elif layout == "trident":
        with read_trident(file, given) as source:
            yield source
    else:
        with open_slide_features(file) as ours:
            yield source_of_ours(ours, str(file), given.get("model"))


def _output(out: Path, root: Path, file: Path, layout: str, source: FeatureSource) -> Path:
    inner = file.parent.relative_to(root) if root.is_dir() else Path()
    if inner.name == H5_FOLDER:
        inner = inner.parent
    if layout == "clam":
        return out / inner / H5_FOLDER / f"{file.stem}.h5"
    if layout == "trident" and not inner.name.startswith(FOLDER):
        inner = inner / _encoder_folder(source)
    return out / inner / f"{file.stem}.h5"


def _encoder_folder(source: FeatureSource) -> str:
    if not source.model:
        raise ValueError(f"{source.where} does not say which model made it, as TRIDENT's folder must; give --model")
    return FOLDER + "".join(sign if sign.isalnum() or sign in "-_.@" else "_" for sign in source.model)


def _write(source: FeatureSource, place: Path, layout: str, overwrite: bool) -> None:
    for path in (place, tensor_file(place)) if layout == "clam" else (place,):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_output(path, overwrite)
    {"ssmamba": write_ours, "clam": write_clam, "trident": write_trident}[layout](source, place, overwrite)
