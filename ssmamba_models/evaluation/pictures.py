"""The pictures of an evaluation: for each task ROC curves and projections, for each encoder a confusion matrix."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ssmamba_models.evaluation.magnification import spread_places
from ssmamba_models.evaluation.plots import MOST_POINTS, draw_confusion, draw_projections, draw_roc, project
from ssmamba_models.evaluation.report import Evaluated


def draw_pictures(folder: Path, evaluated: Evaluated) -> list[dict]:
    """Draw all pictures, as PNG.

    Args:
        folder: where to; it exists.
        evaluated: what was found.

    Returns:
        For each picture its file, task, kind ("confusion", "roc" or "projection") and, for a confusion matrix, label.
    """
    drawn = []
    for number, task in enumerate(evaluated.tasks):
        for label, scores in evaluated.scores[number].items():
            picture = {"file": _file("confusion", task.task.name, label), "kind": "confusion", "label": label}
            title = f"{task.task.name}, {label}: linear probe"
            draw_confusion(folder / picture["file"], scores.methods["linear_probe"].confusion, task.task.classes, title)
            drawn.append(picture | {"task": task.task.name})
        for kind, draw in (("roc", _draw_roc), ("projection", _draw_projection)):
            picture = {"file": _file(kind, task.task.name), "kind": kind, "task": task.task.name}
            draw(folder / picture["file"], evaluated, number)
            drawn.append(picture)
    return drawn


def _file(*parts: str) -> str:
    return "_".join(re.sub(r"[^\w.+-]+", "-", part) for part in parts) + ".png"


def _draw_roc(path: Path, evaluated: Evaluated, number: int) -> None:
    task = evaluated.tasks[number]
    # Seeds differ too little to be told apart in a picture.
    scores = {label: entry.methods["linear_probe"].scores[0] for label, entry in evaluated.scores[number].items()}
    title = f"{task.task.name}: linear probe, one class against the rest"
    draw_roc(path, task.test_labels, scores, task.task.classes, title)


def _draw_projection(path: Path, evaluated: Evaluated, number: int) -> None:
    task = evaluated.tasks[number]
    places = spread_places(task.protocol.test, MOST_POINTS)
    points: dict[str, np.ndarray] = {
        label: project(seeds[0][places]) for label, seeds in evaluated.features.items()
    }
    title = f"{task.task.name}: features of the scored tiles (t-SNE)"
    draw_projections(path, points, task.labels[places], task.task.classes, title)
