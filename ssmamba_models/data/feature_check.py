"""Checks of slide feature files: that they open, hold numbers, lie on the slide, and say where they come from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssmamba_models.data.features import SlideFeatureFile, open_slide_features
from ssmamba_models.data.hdf5 import row_blocks
from ssmamba_models.data.provenance import feature_provenance, mixed_provenance
from ssmamba_models.data.tile_geometry import level0_side


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file.

    Attributes:
        kind: "unreadable", "nan", "infinite", "zero", "duplicate", "outside", "geometry", "provenance" or "mixed".
        message: what it is, in one line.
    """

    kind: str
    message: str


@dataclass(frozen=True)
class FileReport:
    """What was found in a file.

    Attributes:
        path: the file.
        problems: empty where it is fine.
        tiles, embed_dim, dtype: N, D and type of the features; None where the file does not open.
        provenance: as `feature_provenance`; None where the file does not open.
    """

    path: Path
    problems: list[Problem]
    tiles: int | None = None
    embed_dim: int | None = None
    dtype: str | None = None
    provenance: dict[str, Any] | None = None


def check_slide_features(path: str | os.PathLike) -> list[Problem]:
    """Check one slide feature file; the features are read in blocks, so memory is bounded.

    Returns:
        What is wrong with it; empty where nothing is.

    Raises:
        FileNotFoundError: the file does not exist.
        ImportError: h5py is missing.
    """
    return _report(Path(path)).problems


def check_feature_files(paths: Iterable[Path]) -> Iterator[FileReport]:
    """Check slide feature files, and that those of one folder go together (see `mixed_provenance`).

    Args:
        paths: the files.

    Yields:
        A report for each, folder by folder.

    Raises:
        As `check_slide_features`.
    """
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    for files in folders.values():
        yield from _check_folder(files)


def _check_folder(files: list[Path]) -> Iterator[FileReport]:
    reports = [_report(path) for path in files]
    mixed = mixed_provenance({report.path: report.provenance for report in reports if report.provenance is not None})
    for report in reports:
        problems = [Problem("mixed", line) for line in mixed.get(report.path, [])]
        yield replace(report, problems=report.problems + problems)


def _report(path: Path) -> FileReport:
    try:
        with open_slide_features(path) as file:
            problems = [problem for find in _CHECKS for problem in find(file)]
            facts = len(file), file.embed_dim, file.features.dtype.name
            return FileReport(path, problems, *facts, feature_provenance(file))
    except (FileNotFoundError, ImportError):
        raise
    except (ValueError, OSError, RuntimeError) as error:  # the last two: what HDF5 raises where a block is damaged
        return FileReport(path, [Problem("unreadable", str(error))])


def _provenance_problems(file: SlideFeatureFile) -> Iterator[Problem]:
    # Other tools store no hash of the weights; what they made says so.
    needed = ("model",) if "converted_from" in file.attributes else ("model", "weights_sha256")
    missing = [name for name in needed if not file.attributes.get(name)]
    if missing:
        yield Problem("provenance", f"the file does not say {' and '.join(missing)}")


def _geometry_problems(file: SlideFeatureFile) -> Iterator[Problem]:
    expected = level0_side(file.patch_size, file.target_mpp, file.level0_mpp)
    if not math.isclose(expected, file.patch_size_level0, rel_tol=0.01, abs_tol=1):
        yield Problem(
            "geometry",
            f"tiles of {file.patch_size} px at {file.target_mpp:g} um/px are {expected:g} px wide on level 0, not "
            f"{file.patch_size_level0:g} (patch_size_level0)",
        )


def _coords_problems(file: SlideFeatureFile) -> Iterator[Problem]:
    distinct = len(np.unique(file.coords, axis=0))
    if distinct < len(file):
        yield Problem("duplicate", f"{len(file) - distinct} of {len(file)} tiles lie where another lies")
    sides = (file.level0_width, file.level0_height)
    outside = ((file.coords < 0) | (file.coords >= sides)).any(axis=1)
    if outside.any():
        first = int(outside.argmax())
        yield Problem(
            "outside",
            f"{int(outside.sum())} tiles start outside the slide of {sides[0]} x {sides[1]} px (first: row {first} at "
            f"{tuple(file.coords[first].tolist())})",
        )


class _Rows:
    """Counts rows that have a fault, and keeps the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first: int | None = None

    def add(self, faulty: np.ndarray, start: int) -> None:
        if self.first is None and faulty.any():
            self.first = start + int(faulty.argmax())
        self.count += int(faulty.sum())


def _rows_problems(file: SlideFeatureFile) -> Iterator[Problem]:
    yield from _values_problems(file.features, "features", zero=True)
    if file.grid is not None:
        yield from _values_problems(file.grid, "token maps", zero=False)


def _bags_problems(file: SlideFeatureFile) -> Iterator[Problem]:
    if file.bags is None:
        return
    yield from _values_problems(file.bags.features, "features in bags", zero=True, unit="bags")
    known = {tuple(place) for place in file.coords.tolist()}
    strange = [bag for bag, (_, coords) in enumerate(file.bags) if not known.issuperset(map(tuple, coords.tolist()))]
    if strange:
        yield Problem("outside", f"{len(strange)} bags have tiles that the slide has not (first: bag {strange[0]})")


def _values_problems(values: Any, what: str, zero: bool, unit: str = "tiles") -> Iterator[Problem]:
    faults = {"nan": _Rows(), "infinite": _Rows(), **({"zero": _Rows()} if zero else {})}
    for block in row_blocks(len(values), 4 * math.prod(values.shape[1:])):
        read = values[block]
        rows = read.reshape(len(read), -1)
        faults["nan"].add(np.isnan(rows).any(axis=1), block.start)
        faults["infinite"].add(np.isinf(rows).any(axis=1), block.start)
        if zero:
            faults["zero"].add(~read.any(axis=-1).reshape(len(read), -1).all(axis=1), block.start)
    for kind, found in faults.items():
        if found.count:
            word = {"nan": "with NaN", "infinite": "with infinite values", "zero": "that are all zero"}[kind]
            yield Problem(kind, f"{what} of {found.count} of {len(values)} {unit} {word} (first: row {found.first})")


_CHECKS = (_provenance_problems, _geometry_problems, _coords_problems, _rows_problems, _bags_problems)
