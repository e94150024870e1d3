"""Labelled tiles: their classes, groups (patients, slides) and splits, from a manifest.csv or from folders."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssmamba_models.data.csv_rows import column_places, read_csv_rows
from ssmamba_models.data.tiles import TileFolder, find_tiles

MANIFEST = "manifest.csv"
LABEL_COLUMNS = ("label", "class")
# Names in use for one thing; any other name of a split stays as it is.
_SPLIT_ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
_SPLIT_FOLDERS = frozenset({"train", "val", "test"})


@dataclass(frozen=True)
class LabelledTiles(TileFolder):
    """Tiles with what is known of each.

    Attributes:
        groups: N names of what must never be divided (a patient, a slide), or None.
        splits: N names of splits ("train", "val", "test", ...), or None.
    """

    groups: tuple[str, ...] | None = None
    splits: tuple[str, ...] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, sorted; empty where the tiles have no labels."""
        return tuple(sorted(set(self.labels or ())))

    @property
    def known_labels(self) -> tuple[str, ...]:
        """The labels, N names, where there must be some.

        Raises:
            ValueError: the tiles have none.
        """
        if self.labels is None:
            raise ValueError(f"the tiles in {str(self.root)!r} have no labels; name them in folders or a {MANIFEST}")
        return self.labels

    @property
    def units(self) -> tuple[str, ...]:
        """What a split may not divide, N names: the groups, or each tile by itself where there are none."""
        return self.groups if self.groups is not None else self.paths

    def subset(self, indices: Iterable[int]) -> LabelledTiles:
        """The tiles at these places, in this order.

        Raises:
            ValueError: no place is given.
        """
        places = list(indices)
        if not places:
            raise ValueError(f"no tile is left of the {len(self)} in {str(self.root)!r}")
        columns = (self.paths, self.labels, self.groups, self.splits)
        return LabelledTiles(self.root, *(None if column is None else _take(column, places) for column in columns))

    def select(self, split: str | None = None, classes: Sequence[str] | None = None) -> LabelledTiles:
        """The tiles of a split, of some classes, or both.

        Raises:
            ValueError: no tile is of that split or of one of these classes; the message names what there is.
        """
        self._require("split", [] if split is None else [split], self.splits)
        self._require("class", classes or [], self.labels)
        wanted = None if classes is None else set(classes)
        return self.subset(
            index
            for index in range(len(self))
            if (split is None or self.splits[index] == split) and (wanted is None or self.labels[index] in wanted)
        )

    def _require(self, what: str, names: Sequence[str], column: tuple[str, ...] | None) -> None:
        known = sorted(set(column or ()))
        for name in names:
            if name not in known:
                raise ValueError(
                    f"no tile in {str(self.root)!r} is of {what} {name!r}; there is: {', '.join(known) or 'none'}"
                )

    def sha256(self) -> str:
        """The SHA-256 of paths, labels, groups and splits: tells whether two runs saw the same list of tiles."""
        columns = [self.paths, self.labels, self.groups, self.splits]
        return hashlib.sha256(json.dumps(columns, ensure_ascii=True).encode()).hexdigest()


def _take(column: Sequence[str], places: list[int]) -> tuple[str, ...]:
    return tuple(column[place] for place in places)


def read_tiles(folder: str | os.PathLike) -> LabelledTiles:
    """Read what a folder says of its tiles.

    Three layouts are known:

    - `folder/manifest.csv` with the column `path` (relative to the folder) and, each optional, `label` (or `class`),
      `group` and `split`; other columns are ignored, and only the files that it lists are tiles;
    - `folder/train/<class>/...` and `folder/val/<class>/...` (and `test`): splits and classes from folder names;
    - `folder/<class>/...`, or any other folder of tiles, as `find_tiles` reads it.

    Args:
        folder: the folder of tiles.

    Returns:
        The tiles, sorted by path. `labels` is None where nothing names classes.

    Raises:
        ValueError: a manifest that is not UTF-8 or not CSV, lacks the column `path` or rows, has an empty entry, a
            path twice or one outside the folder, or a group in two splits; other tiles beside folders of splits; or no
            tile in the folder.
        FileNotFoundError: the folder, or a file that the manifest lists, does not exist.
        NotADirectoryError, OSError: as `find_tiles`.
    """
    root = Path(folder)
    manifest = root / MANIFEST
    return read_manifest(manifest) if manifest.is_file() else _read_folders(root)


def _read_folders(root: Path) -> LabelledTiles:
    found = find_tiles(root)
    parts = [path.split("/") for path in found.paths]
    tops = {_split_name(names[0]) if len(names) > 1 else "" for names in parts}
    if "train" in tops and len(tops & _SPLIT_FOLDERS) > 1:
        _check_splits_alone(root, found.paths)
    labels = tuple(names[1] for names in parts) if all(len(names) > 2 for names in parts) else None
    # A class may be called "test"; two such names, with folders in them, are splits.
    if not tops <= _SPLIT_FOLDERS or ("train" not in tops and (len(tops) < 2 or labels is None)):
        return LabelledTiles(found.root, found.paths, found.labels)
    return LabelledTiles(found.root, found.paths, labels, splits=tuple(_split_name(names[0]) for names in parts))


def _check_splits_alone(root: Path, paths: Sequence[str]) -> None:
    # Read as classes, the splits would be what a classifier learns to tell apart.
    strays = sorted({path.split("/")[0] for path in paths if _split_name(path.split("/")[0]) not in _SPLIT_FOLDERS})
    if strays:
        raise ValueError(
            f"{str(root)!r} holds folders of splits and, beside them, {strays[0]!r}"
            + (f" and {len(strays) - 1} more" if len(strays) > 1 else "")
            + f", which is none; move it away, hide it (.{strays[0]}), or list the tiles in a {MANIFEST}"
        )


def _split_name(name: str) -> str:
    lower = name.lower()
    return _SPLIT_ALIASES.get(lower, lower if lower in _SPLIT_FOLDERS else name)


def read_manifest(manifest: Path) -> LabelledTiles:
    """The tiles that a manifest lists; raises as `read_tiles`, which reads the manifest of a folder."""
    root = manifest.parent
    header, rows = read_csv_rows(manifest, "tile")
    names = column_places(manifest, header, ("path", *LABEL_COLUMNS, "group", "split"))
    if "path" not in names:
        raise ValueError(
            f"{str(manifest)!r} has no column 'path' (its columns: {', '.join(header)}); expected a first line such "
            "as path,label,group,split, separated by commas"
        )
    label = next((name for name in LABEL_COLUMNS if name in names), None)
    wanted = {"path": "path", "label": label, "group": "group", "split": "split"}
    columns = {
        key: manifest_column(manifest, rows, name, names[name]) if name in names else None
        for key, name in wanted.items()
    }
    paths = [tile_path(root, manifest, line, text) for (line, _), text in zip(rows, columns["path"])]
    _check_paths(root, manifest, paths)
    splits = columns["split"] and tuple(map(_split_name, columns["split"]))
    tiles = LabelledTiles(root, paths, columns["label"], columns["group"], splits)
    tiles = tiles.subset(sorted(range(len(paths)), key=paths.__getitem__))
    _check_groups(tiles, manifest)
    return tiles


def manifest_column(manifest: Path, rows: list[tuple[int, list[str]]], name: str, place: int) -> tuple[str, ...]:
    """The entries of one column (ValueError: one is empty)."""
    values = tuple(fields[place].strip() for _, fields in rows)
    for (line, _), value in zip(rows, values):
        if not value:
            raise ValueError(f"{str(manifest)!r}, line {line}: the {name} is empty; fill it in or leave the line out")
    return values


def tile_path(root: Path, manifest: Path, line: int, text: str) -> str:
    """A tile's path as `LabelledTiles` has it (ValueError: it leads out of the folder)."""
    # A manifest from Windows has backslashes, which elsewhere are letters of a name.
    if "\\" in text and not (root / text).exists():
        text = text.replace("\\", "/")
    path = posixpath.normpath(text)
    if os.path.isabs(path):
        path = Path(os.path.relpath(path, root)).as_posix()
    if posixpath.isabs(path) or os.path.isabs(path) or path.split("/")[0] == "..":
        raise ValueError(
            f"{str(manifest)!r}, line {line}: {text!r} leads out of the folder {str(root)!r}; give paths in it, "
            "relative to it"
        )
    return path


def _check_paths(root: Path, manifest: Path, paths: list[str]) -> None:
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"{str(manifest)!r} lists {path!r} twice; a tile has one line")
        seen.add(path)
    missing = [path for path in paths if not (root / path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(paths)} tiles in {str(manifest)!r} do not exist (first: {missing[0]!r}); "
            "paths are relative to the manifest's folder"
        )


def _check_groups(tiles: LabelledTiles, manifest: Path) -> None:
    if tiles.groups is None or tiles.splits is None:
        return
    split_of: dict[str, str] = {}
    for group, split in zip(tiles.groups, tiles.splits):
        if split_of.setdefault(group, split) != split:
            raise ValueError(
                f"the group {group!r} is in two splits, {split_of[group]!r} and {split!r}: what is learned from it "
                f"would be tested on it; move all of it to one split in {str(manifest)!r}"
            )


def group_split(
    tiles: LabelledTiles, val_fraction: float = 0.2, seed: int = 0, train_split: str = "train", val_split: str = "val"
) -> tuple[list[int], list[int]]:
    """Places of the tiles to train on and of those to validate with; no group is in both.

    The tiles' own splits are used where they have them; tiles of a third split are in neither. Where there is no split
    "val", a share of the groups (of "train" where there are splits), drawn class by class, is held out.

    Args:
        tiles: the tiles; without groups each tile is one.
        val_fraction: share of the groups to hold out, above 0 and below 1; unused where there is a split "val".
        seed: the same seed draws the same groups, whatever other classes there are.
        train_split, val_split: other names of the two splits.

    Returns:
        (train, val), sorted; both hold something.

    Raises:
        ValueError: a fraction out of range, a split that is not there ("val" may be missing), one split named for
            both, or too few groups to hold one out.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, expected a number between 0 and 1")
    if train_split == val_split:
        raise ValueError(f"train_split and val_split are both {train_split!r}; what is trained on cannot validate")
    named = [name for name, usual in ((train_split, "train"), (val_split, "val")) if name != usual]
    tiles._require("split", named if tiles.splits is None else [train_split, *named], tiles.splits)
    kept = list(range(len(tiles)))
    if tiles.splits is not None:
        kept = [index for index in kept if tiles.splits[index] == train_split]
        val = [index for index, split in enumerate(tiles.splits) if split == val_split]
        if val:
            return kept, val
    drawn = set(_draw_groups(tiles, kept, val_fraction, seed, spare=1))
    val = [index for index in kept if tiles.units[index] in drawn]
    train = [index for index in kept if tiles.units[index] not in drawn]
    if not val:
        raise ValueError(
            f"no class of the tiles in {str(tiles.root)!r} has two groups, so none can be held out for validation; "
            "add tiles of other patients, or name the validation tiles in the manifest's column 'split'"
        )
    return train, val


def group_fraction(tiles: LabelledTiles, fraction: float, seed: int = 0) -> list[int]:
    """Places of the tiles of a share of the groups, for runs with few labels.

    Drawn class by class, at least one group with tiles of each; with one seed, a smaller share is a part of a larger
    one. A group of several classes is drawn for the one that has the fewest groups; where that leaves a class without
    any, the group of it that a larger share would draw first is added.

    Args:
        tiles: the tiles; without groups each tile is one.
        fraction: share of the groups, above 0 and at most 1.
        seed: the same seed draws the same groups, whatever other classes there are.

    Returns:
        The places, sorted.

    Raises:
        ValueError: a fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of the groups is {fraction}, expected above 0 and at most 1")
    drawn = set(_draw_groups(tiles, range(len(tiles)), fraction, seed))
    drawn |= _first_of_lost_classes(tiles, drawn, seed)
    return [index for index in range(len(tiles)) if tiles.units[index] in drawn]


def _first_of_lost_classes(tiles: LabelledTiles, drawn: set[str], seed: int) -> set[str]:
    """For each class that no drawn group has, the group of it that is drawn first as the share grows."""
    classes_of = _classes_of(tiles, range(len(tiles)))
    lost = set(tiles.classes) - {label for group in drawn for label in classes_of[group]}
    if not lost:
        return set()
    # Place p of n is drawn from the share (p + 0.5) / n on; of equal ones odd places come first, as round() has it.
    turn = {
        group: ((place + 0.5) / len(groups), place % 2 == 0)
        for groups in _shuffled_strata(tiles, range(len(tiles)), seed).values()
        for place, group in enumerate(groups)
    }
    return {min((group for group in turn if label in classes_of[group]), key=turn.__getitem__) for label in lost}


def _draw_groups(tiles: LabelledTiles, places: Iterable[int], fraction: float, seed: int, spare: int = 0) -> list[str]:
    """A share of the groups of each class, at least one; but `spare` groups of each class are left."""
    drawn: list[str] = []
    for groups in _shuffled_strata(tiles, places, seed).values():
        count = min(max(1, round(fraction * len(groups))), len(groups) - spare)
        drawn += groups[:count]
    return drawn


def _shuffled_strata(tiles: LabelledTiles, places: Iterable[int], seed: int) -> dict[str, list[str]]:
    """As `_strata`, the groups of each class in the order in which they are drawn."""
    shuffled = {}
    for label, groups in _strata(tiles, places).items():
        # Seeded by the class's name: leaving another class out must not change what is drawn of this one.
        rng = np.random.default_rng([seed, zlib.crc32(label.encode("utf-8", "surrogateescape"))])
        shuffled[label] = [groups[place] for place in rng.permutation(len(groups))]
    return shuffled


def _strata(tiles: LabelledTiles, places: Iterable[int]) -> dict[str, list[str]]:
    """class -> its groups, sorted. A group of several classes counts for the one that has the fewest groups."""
    classes_of = _classes_of(tiles, places)
    frequency: dict[str, int] = defaultdict(int)
    for labels in classes_of.values():
        for label in labels:
            frequency[label] += 1
    strata: dict[str, list[str]] = defaultdict(list)
    for group in sorted(classes_of):
        strata[min(classes_of[group], key=lambda label: (frequency[label], label))].append(group)
    return dict(sorted(strata.items()))


def _classes_of(tiles: LabelledTiles, places: Iterable[int]) -> dict[str, set[str]]:
    """group -> its classes; "" where the tiles have no labels."""
    classes_of: dict[str, set[str]] = defaultdict(set)
    for place in places:
        classes_of[tiles.units[place]].add(tiles.labels[place] if tiles.labels is not None else "")
    return classes_of
