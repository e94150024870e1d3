"""Which tiles a probe learns from and which it is scored on; a group is never on both sides."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ssmamba_models.data.labelled import LabelledTiles, group_fraction
from ssmamba_models.evaluation.tasks import Task

# With a split from the manifest a seed leaves out a tenth of the training groups: enough to see how much the figures
# hang on them, little enough to keep the figures those of the whole training set.
TRAIN_SHARE = 0.9

Noun = Literal["tile", "slide"]
_SPLITS_OF: dict[Noun, str] = {"tile": "the manifest's column 'split'", "slide": "the labels' column 'split'"}


@dataclass(frozen=True)
class Fold:
    """One fit: places of the tiles to learn from, (N_train,), and of those to score, (N_test,); both sorted."""

    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Protocol:
    """The folds of a task, the same for every model.

    Attributes:
        kind: "split" (one fold, from the tiles' own splits) or "folds" (each tile is scored once).
        seeds: for each seed its folds.
        test_split: the name of the split that is scored, for "split".
    """

    kind: str
    seeds: tuple[tuple[Fold, ...], ...]
    test_split: str | None = None

    @property
    def test(self) -> np.ndarray:
        """Places of all tiles that are scored, sorted; the same for every seed."""
        return np.sort(np.concatenate([fold.test for fold in self.seeds[0]]))


def make_protocol(
    tiles: LabelledTiles, task: Task, folds: int = 5, seeds: int = 3, noun: Noun = "tile"
) -> Protocol:
    """Choose the folds of a task.

    Where the tiles have splits, probes learn from "train" and are scored on "test", or on "val" where there is no
    "test"; with more than one seed, each learns from 90 % of the training groups, drawn class by class. Where they
    have none, group-wise stratified folds, drawn anew for each seed.

    Args:
        tiles: the tiles; without groups each tile is one.
        task: tiles of other classes are left out.
        folds: number of folds where there are no splits, at least 2.
        seeds: number of seeds, at least 1.
        noun: what is divided, for messages.

    Returns:
        The folds; places refer to `tiles`.

    Raises:
        ValueError: a class lacks tiles on either side, or has fewer groups than there are folds; splits without
            "train", or without "val" and "test".
    """
    if folds < 2 or seeds < 1:
        raise ValueError(f"folds is {folds} and seeds {seeds}; expected 2 or more and 1 or more")
    if tiles.splits is not None:
        return _from_splits(tiles, task, seeds, noun)
    return _from_groups(tiles, task, folds, seeds, noun)


def _of_task(tiles: LabelledTiles, task: Task) -> np.ndarray:
    return np.flatnonzero(np.isin(np.asarray(tiles.labels), task.classes))


def _from_splits(tiles: LabelledTiles, task: Task, seeds: int, noun: Noun) -> Protocol:
    splits = np.asarray(tiles.splits)
    there = sorted(set(tiles.splits or ()))
    test_split = next((name for name in ("test", "val") if name in there), None)
    if "train" not in there or test_split is None:
        raise ValueError(
            f"the splits of the {noun}s in {str(tiles.root)!r} are {', '.join(there)}; expected train, and val or test"
        )
    places = _of_task(tiles, task)
    train, test = places[splits[places] == "train"], places[splits[places] == test_split]
    for name, part in (("train", train), (test_split, test)):
        _check_every_class(tiles, task, part, name, noun)
    return Protocol("split", tuple((Fold(part, test),) for part in _training_parts(tiles, train, seeds)), test_split)


def _check_every_class(tiles: LabelledTiles, task: Task, places: np.ndarray, split: str, noun: Noun) -> None:
    labels = tiles.known_labels
    for name in task.classes:
        if not any(labels[place] == name for place in places):
            raise ValueError(
                f"task {task.name!r}: no {noun} of class {name!r} is in the split {split!r}; "
                f"each class needs {noun}s to learn from and {noun}s to be scored on"
            )


def _training_parts(tiles: LabelledTiles, train: np.ndarray, seeds: int) -> list[np.ndarray]:
    if seeds == 1:
        return [train]
    subset = tiles.subset(train)
    return [train[group_fraction(subset, TRAIN_SHARE, seed)] for seed in range(seeds)]


def _from_groups(tiles: LabelledTiles, task: Task, folds: int, seeds: int, noun: Noun) -> Protocol:
    from sklearn.model_selection import StratifiedGroupKFold

    places = _of_task(tiles, task)
    labels = np.asarray(tiles.labels)[places]
    groups = np.asarray(tiles.units)[places]
    for name in task.classes:
        count = len(set(groups[labels == name]))
        if count < folds:
            raise ValueError(
                f"task {task.name!r}: class {name!r} has {count} groups, too few for {folds} folds; add {noun}s of "
                "other groups" + (f", or use --folds {count}" if count > 1 else "")
            )
    drawn = []
    for seed in range(seeds):
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            # It counts tiles, we counted groups; and a group of several classes is one of each.
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            parts = [Fold(places[train], places[test]) for train, test in splitter.split(places, labels, groups)]
        drawn.append(tuple(part for part in parts if len(part.test)))
    _check_training(tiles, task, drawn, folds, noun)
    return Protocol("folds", tuple(drawn))


def _check_training(
    tiles: LabelledTiles, task: Task, drawn: list[tuple[Fold, ...]], folds: int, noun: Noun
) -> None:
    labels = np.asarray(tiles.labels)
    for fold in (fold for parts in drawn for fold in parts):
        missing = set(task.classes) - set(labels[fold.train])
        if missing:
            raise ValueError(
                f"task {task.name!r}: a fold has no training {noun} of class {min(missing)!r}, since groups hold "
                f"several classes; {'use fewer --folds' if folds > 2 else f'add {noun}s of other groups'}, or name "
                f"the splits in {_SPLITS_OF[noun]}"
            )
