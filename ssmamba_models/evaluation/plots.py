"""Pictures of an evaluation: confusion matrix, ROC curves, and features in two dimensions coloured by class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's colours, told apart by colour-blind readers too; shapes tell on once they repeat.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
_MARKERS = ("o", "^", "s", "D", "v", "P")
_LINES = ("-", "--", ":", "-.")
# t-SNE takes seconds for so many points, minutes for ten times as many.
MOST_POINTS = 1500


def _figure(columns: int, rows: int = 1, side: float = 3.6) -> tuple[Any, Any]:
    # Without pyplot no display is needed, and no figure outlives its use.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * side, rows * side), dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_confusion(path: Path, confusion: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Draw a confusion matrix: colour and first number are shares of the true class, the second counts over all seeds.

    Args:
        path: PNG file.
        confusion: (C, C) counts, rows are true classes.
        classes: C names.
        title: the title.
    """
    figure, axes = _figure(1, side=max(3.8, 0.8 * len(classes) + 1.8))
    axis = axes[0, 0]
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, shrink=0.75, label="share of the true class")
    ticks = range(len(classes))
    axis.set(xlabel="predicted (shares; counts of all seeds)", ylabel="true", title=title)
    axis.set_xticks(ticks, classes, rotation=45, ha="right")
    axis.set_yticks(ticks, classes)
    if len(classes) <= 20:
        for row, column in np.ndindex(*confusion.shape):
            colour = "white" if share[row, column] > 0.5 else "black"
            text = f"{share[row, column]:.2f}\n{confusion[row, column]}"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path)


def roc_curve(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate at every threshold, from (0, 0) to (1, 1).

    Args:
        positive: (N,) bool.
        score: (N,), higher means more likely.
    """
    from sklearn.metrics import roc_curve as curve

    false, true, _ = curve(positive, score)
    return false, true


def draw_roc(
    path: Path, labels: np.ndarray, scores: Mapping[str, np.ndarray], classes: Sequence[str], title: str
) -> None:
    """Draw the ROC curves of several encoders, one panel per class against the others.

    Args:
        path: PNG file.
        labels: (N,) classes 0..C-1.
        scores: encoder -> (N, C).
        classes: C names.
        title: the title.
    """
    columns = min(4, len(classes))
    figure, axes = _figure(columns, math.ceil(len(classes) / columns))
    for place, axis in enumerate(axes.flat):
        if place >= len(classes):
            axis.set_axis_off()
            continue
        for number, (label, score) in enumerate(scores.items()):
            style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number % len(_LINES)]}
            axis.plot(*roc_curve(labels == place, score[:, place]), label=label, linewidth=1.5, **style)
        axis.plot((0, 1), (0, 1), color="0.7", linewidth=0.8, zorder=0)
        axis.set(xlabel="false positive rate", ylabel="true positive rate", title=classes[place], aspect="equal")
    axes[0, 0].legend(fontsize=7, loc="lower right")
    figure.suptitle(title)
    figure.savefig(path)


def project(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Features in two dimensions: standardised, 50 principal components, t-SNE (without it below 10 tiles).

    Args:
        features: (N, D).
        seed: makes the picture the same in each run.

    Returns:
        (N, 2).
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    parts = PCA(min(50, *scaled.shape), random_state=seed).fit_transform(scaled)
    # t-SNE cannot start from points that all are one.
    if len(parts) < 10 or not parts.any():
        return np.pad(parts, ((0, 0), (0, 2)))[:, :2]
    return TSNE(perplexity=min(30, (len(parts) - 1) / 3), init="pca", random_state=seed).fit_transform(parts)


def draw_projections(
    path: Path, points: Mapping[str, np.ndarray], labels: np.ndarray, classes: Sequence[str], title: str
) -> None:
    """Draw the projected features of several encoders side by side, coloured by class.

    Args:
        path: PNG file.
        points: encoder -> (N, 2).
        labels: (N,) classes 0..C-1.
        classes: C names.
        title: the title.
    """
    columns = min(3, len(points))
    figure, axes = _figure(columns, math.ceil(len(points) / columns), side=4.2)
    for axis in axes.flat[len(points) :]:
        axis.set_axis_off()
    for axis, (name, place) in zip(axes.flat, points.items()):
        for number, label in enumerate(classes):
            marker, colour = _MARKERS[number % len(_MARKERS)], _COLOURS[number % len(_COLOURS)]
            chosen = place[labels == number]
            axis.scatter(*chosen.T, s=10, marker=marker, color=colour, alpha=0.7, linewidths=0, label=label)
        axis.set(title=name, xticks=[], yticks=[])
    axes[0, 0].legend(fontsize=7, markerscale=1.5)
    figure.suptitle(title)
    figure.savefig(path)


def draw_learning_curves(
    path: Path, curves: Mapping[str, Sequence[tuple[float, Mapping[str, float]]]], metric: str, title: str
) -> None:
    """Draw a metric over the number of training slides, with its intervals.

    Args:
        path: PNG file.
        curves: label -> (training slides, estimate with value, low and high), by rising number.
        metric: what the figure is called.
        title: the title.
    """
    figure, axes = _figure(1, side=5.2)
    axis = axes[0, 0]
    for number, (label, points) in enumerate(curves.items()):
        counts = [count for count, _ in points]
        colour, line = _COLOURS[number % len(_COLOURS)], _LINES[number // len(_COLOURS) % len(_LINES)]
        values, low, high = ([one[name] for _, one in points] for name in ("value", "low", "high"))
        axis.plot(counts, values, color=colour, linestyle=line, marker="o", markersize=4, label=label)
        axis.fill_between(counts, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.set(xscale="log", xlabel="training slides", ylabel=f"{metric} (95 % interval)", title=title)
    ticks = sorted({count for points in curves.values() for count, _ in points})
    axis.set_xticks(ticks, [f"{count:g}" for count in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=7, loc="lower right")
    figure.savefig(path)
