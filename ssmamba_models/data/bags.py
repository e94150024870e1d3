"""Bags: the slides that have feature files, with their labels, patients and splits; and reading their tiles.

Slides whose features come from different encoders, or at another mpp or tile size, never stand in one set of bags.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssmamba_models.data.features import SlideFeatureFile, open_slide_features
from ssmamba_models.data.hdf5 import damage_named
from ssmamba_models.data.provenance import ENCODER, TILES, same_provenance
from ssmamba_models.data.slide_labels import check_slide_labels, match_slides, read_slide_labels, some_names

_READ_ROWS = 8192
# Where features lie in the folder of a job. Beside a misspelt folder nothing else is searched: that may be anything.
_JOB_FOLDERS = ("features*", "*mpp_*px_*px/features_*")


@dataclass(frozen=True)
class Bag:
    """The tiles of a slide, on the disk.

    Attributes:
        slide: name of the slide.
        path: its feature file.
        tiles: N.
        label: name of its class; None where it is not known.
        patient: whose slide it is; never divided between training and testing.
        split: "train", "val", "test", or None.
        patch_size_level0: side of a tile in level-0 pixels; None where it was not read.
        shared_bags: how many bags of shared augmentation it has.
    """

    slide: str
    path: Path
    tiles: int
    label: str | None = None
    patient: str | None = None
    split: str | None = None
    patch_size_level0: float | None = None
    shared_bags: int = 0

    def read(self, places: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Read the tiles, or some of them; memory is that of what is asked for.

        Args:
            places: (n,) sorted indices of tiles; None reads all.

        Returns:
            features (n, D), float32 or float16 as stored, and coords (n, 2) int64.

        Raises:
            ValueError, OSError, ImportError: as `open_slide_features`; ValueError where a block is damaged.
        """
        with self._opened() as file:
            if places is None:
                return file.features[:], file.coords
            return _some_rows(file.features, places), file.coords[places]

    def read_shared(self, number: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Read one of the bags of shared augmentation, or all of them.

        Returns:
            features (n, D), float32 or float16 as stored, and coords (n, 2) int64; of all, (A, n, D) and (A, n, 2).

        Raises:
            ValueError, OSError, ImportError: as `read`; ValueError where the file has bags no more.
        """
        with self._opened() as file:
            if file.bags is None:
                raise ValueError(f"the slide {self.slide!r} has lost its bags of shared augmentation")
            return file.bags[slice(None) if number is None else number]

    @contextlib.contextmanager
    def _opened(self) -> Iterator[SlideFeatureFile]:
        with open_slide_features(self.path) as file, damage_named(self.path, "extract (or convert) the slide again"):
            yield file


def _some_rows(features: Any, places: np.ndarray) -> np.ndarray:
    # HDF5 picks scattered rows one by one; whole blocks are read faster, and only the wanted rows kept.
    blocks = [
        features[start : start + _READ_ROWS][
            places[np.searchsorted(places, start) : np.searchsorted(places, start + _READ_ROWS)] - start
        ]
        for start in range(0, len(features), _READ_ROWS)
    ]
    return np.concatenate(blocks)


@dataclass(frozen=True)
class Bags:
    """Slides that belong together.

    Attributes:
        folder: where their feature files lie.
        bags: the slides, sorted by name.
        feature_dim: D.
        provenance: what their features have in common: model, weights, input transform, mpp and tile geometry.
        unlabelled: slides in the folder that the labels do not name; they are not in `bags`.
        missing: slides of the labels without a feature file, where that was allowed.
    """

    folder: Path
    bags: tuple[Bag, ...]
    feature_dim: int
    provenance: dict[str, Any]
    unlabelled: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.bags)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, sorted."""
        return tuple(sorted({bag.label for bag in self.bags if bag.label is not None}))

    @property
    def targets(self) -> np.ndarray:
        """(len,) int64: the place of each slide's class in `classes`."""
        classes = self.classes
        return np.array([classes.index(bag.label) for bag in self.bags], dtype=np.int64)

    @property
    def patients(self) -> tuple[str | None, ...]:
        """Whose slide each is."""
        return tuple(bag.patient for bag in self.bags)

    def sha256(self) -> str:
        """The SHA-256 of names, tiles, labels, patients, splits and provenance: tells whether two runs saw the same."""
        rows = [(bag.slide, bag.tiles, bag.label, bag.patient, bag.split) for bag in self.bags]
        return hashlib.sha256(json.dumps([rows, self.feature_dim, self.provenance]).encode()).hexdigest()


def open_bag(path: str | os.PathLike) -> tuple[Bag, dict[str, Any]]:
    """A slide by its feature file alone, and the provenance of its features (see `Bags`).

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: as `open_slide_features`; ValueError where the slide's name
            is not UTF-8: no table could hold it.
    """
    try:
        Path(path).stem.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the name of {os.fsencode(path)!r} is not valid UTF-8; rename the file") from error
    with open_slide_features(path) as file:
        attributes = {key: file.attributes.get(key) for key in ENCODER}
        geometry = {key: file.coords_attributes[key] for key in TILES}
        provenance = {"feature_dim": file.embed_dim, **_plain(attributes), **geometry}
        facts: dict[str, Any] = {"patch_size_level0": file.patch_size_level0, "shared_bags": len(file.bags or ())}
        return Bag(Path(path).stem, Path(path), len(file), **facts), provenance


def read_bags(features: str | os.PathLike, labels: str | os.PathLike, *, skip_missing: bool = False) -> Bags:
    """The slides that a table of labels names, with their feature files.

    Args:
        features: folder of feature files, `<slide>.h5`.
        labels: CSV, as `read_slide_labels`. A slide may have its file's suffix.
        skip_missing: leave out slides without a feature file, instead of refusing.

    Returns:
        The slides, sorted by name.

    Raises:
        FileNotFoundError: a file or folder, or the feature file of a slide, does not exist.
        ValueError: the table is no CSV, lacks a column, an entry or rows, names a slide twice, has fewer than two
            classes, an unknown split, or a patient in two splits; or a feature file is damaged, or the features are of
            different provenance.
        ImportError: h5py is missing.
    """
    rows = read_slide_labels(labels)
    files = {path.stem: path for path in feature_files(features)}
    found, missing = match_slides(rows, files, labels)
    if missing and (not skip_missing or not found):
        raise FileNotFoundError(
            f"{len(missing)} of the {len(rows)} slides in {str(labels)!r} have no feature file in {str(features)!r} "
            f"({some_names(missing)}); extract them, take them out of the table, or leave them out with --skip-missing"
        )
    check_slide_labels(found, labels)
    opened = {slide: open_bag(files[slide]) for slide in sorted(found)}
    common = check_same_provenance({slide: provenance for slide, (_, provenance) in opened.items()})
    bags = tuple(replace(bag, **found[slide]) for slide, (bag, _) in opened.items())
    return Bags(Path(features), bags, common["feature_dim"], common, tuple(sorted(set(files) - set(found))), missing)


def check_same_provenance(provenances: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the features of several slides have in common.

    Args:
        provenances: slide -> its provenance.

    Returns:
        The provenance that all share.

    Raises:
        ValueError: they differ in something; the message names it, and two slides.
    """
    first, common = next(iter(provenances.items()))
    for slide, provenance in provenances.items():
        for key, value in provenance.items():
            # What a model of an earlier version does not state of its features cannot differ from theirs.
            if not same_provenance(key, value, common.get(key, value)):
                raise ValueError(
                    f"the features of {first!r} and {slide!r} do not belong together: {key} is {common[key]!r} and "
                    f"{value!r}; extract all slides with one model, weights, precision, mpp and tile size, or keep "
                    "them in folders apart"
                )
    return dict(common)


def feature_files(features: str | os.PathLike) -> list[Path]:
    """The feature files (`*.h5`) of a folder, not of those below it, sorted; or the one file that is named.

    Raises:
        FileNotFoundError: there is no such folder or file, or no feature file in it.
    """
    folder = Path(features)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        hint = _folders_with_features(folder.parent, _JOB_FOLDERS) or "`ssmamba extract` makes one"
        raise FileNotFoundError(f"the folder of features {str(folder)!r} does not exist; {hint}")
    files = sorted(path for path in folder.glob("*.h5") if not path.name.startswith("."))
    if not files:
        hint = _folders_with_features(folder, ("*", "*/*")) or "`ssmamba extract` makes them"
        raise FileNotFoundError(f"no feature file (*.h5) lies in {str(folder)!r}; {hint}")
    return files


def _folders_with_features(folder: Path, patterns: Sequence[str]) -> str:
    """What to give instead: the folders with feature files that lie where the patterns say; "" where there is none."""
    below: set[str] = set()
    with contextlib.suppress(OSError):  # it is but a hint
        below = {str(path.parent) for pattern in patterns for path in folder.glob(f"{pattern}/*.h5")}
    return f"give one of these: {some_names(sorted(below))}" if below else ""


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Values that JSON gives back as they are: a model file keeps them."""
    return json.loads(json.dumps(attributes, default=lambda value: np.asarray(value).tolist()))
