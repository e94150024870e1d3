"""Classification tasks: which classes are told apart, and which tiles that concerns."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ssmamba_models.data.labelled import LabelledTiles

ALL_CLASSES = "all"


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: what the report calls it.
        classes: the C classes that it tells apart, sorted.
    """

    name: str
    classes: tuple[str, ...]


def parse_task(text: str) -> Task:
    """Read `NAME=class,class,...`, as `--task` takes it.

    Raises:
        ValueError: not of that form, fewer than two classes, or a class twice.
    """
    name, equals, listed = (part.strip() for part in text.partition("="))
    classes = [entry.strip() for entry in listed.split(",")]
    if not equals or not name or not all(classes):
        raise ValueError(f"the task {text!r} is not of the form NAME=class,class,... (such as lung=benign,tumour)")
    _check_name(name)
    if len(set(classes)) < len(classes):
        raise ValueError(f"the task {name!r} names a class twice: {listed}")
    if len(classes) < 2:
        raise ValueError(f"the task {name!r} has one class, {classes[0]!r}; there is nothing to tell it from: name two")
    return Task(name, tuple(sorted(classes)))


def _check_name(name: str) -> None:
    # A task's name becomes part of file names.
    if "/" in name or "\\" in name or name.startswith("."):
        raise ValueError(f"the task's name {name!r} cannot be part of a file name; use letters, digits, - and _")


def choose_tasks(tiles: LabelledTiles, tasks: Sequence[Task] = ()) -> tuple[Task, ...]:
    """The tasks to score: those asked for, or one of all classes.

    Args:
        tiles: the tiles to score.
        tasks: tasks asked for.

    Returns:
        At least one task.

    Raises:
        ValueError: no labels, a single class, a class that is not there, or two tasks of one name.
    """
    if tiles.labels is None:
        raise ValueError(
            f"the tiles in {str(tiles.root)!r} have no labels; put each class in a folder of its own, or write a "
            "manifest.csv with the columns path and label"
        )
    if len(tiles.classes) < 2:
        raise ValueError(
            f"all tiles in {str(tiles.root)!r} are of one class, {tiles.classes[0]!r}; an evaluation needs two or more"
        )
    for task in tasks:
        _check_classes(tiles, task)
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tasks are called {name!r}; give each a name of its own")
    return tuple(tasks) or (Task(ALL_CLASSES, tiles.classes),)


def _check_classes(tiles: LabelledTiles, task: Task) -> None:
    for name in task.classes:
        if name not in tiles.classes:
            near = difflib.get_close_matches(name, tiles.classes, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"the task {task.name!r} names the class {name!r}, which is not there{hint} "
                f"(there is: {', '.join(tiles.classes)})"
            )
