"""Metrics of a classifier, for the test tiles as they are and for all bootstrap draws at once.

scikit-learn's functions score one draw at a time, which for a thousand draws of several models takes minutes; these
take weights. Without weights, and with tiles of every class, they equal scikit-learn's (tested).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ssmamba_models.evaluation.bootstrap import Estimate, Resampling

# Draws whose ranks are worked out together: memory against speed.
_CHUNK = 64


@dataclass(frozen=True)
class ClassCounts:
    """What accuracy, recall and F1 are made of, each (..., C): tiles found, tiles predicted, tiles there."""

    hits: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray

    def scores(self) -> dict[str, np.ndarray]:
        """macro_f1, balanced_accuracy and accuracy, each (...,); a class without tiles does not count.

        Nor does it if it is predicted: its F1 would be 0 in the draws that lack it, whatever the classifier.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            f1 = np.where(self.actual > 0, 2 * self.hits / (self.predicted + self.actual), np.nan)
            recall = self.hits / self.actual
            accuracy = self.hits.sum(axis=-1) / self.actual.sum(axis=-1)
        return {"macro_f1": mean_of_known(f1), "balanced_accuracy": mean_of_known(recall), "accuracy": accuracy}


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis without its NaNs; NaN, and no warning, where there is nothing else."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    return np.where(count, np.where(known, values, 0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def count_by_group(
    actual: np.ndarray, predicted: np.ndarray, group_of: np.ndarray, groups: int, classes: int
) -> ClassCounts:
    """Counts for each group.

    Args:
        actual, predicted: (N,) classes as numbers 0..C-1.
        group_of: (N,) groups as numbers 0..G-1.
        groups, classes: G and C.

    Returns:
        `ClassCounts` of (G, C).
    """

    def count(values: np.ndarray, where: np.ndarray) -> np.ndarray:
        cells = group_of[where] * classes + values[where]
        return np.bincount(cells, minlength=groups * classes).reshape(groups, classes).astype(np.float32)

    everywhere = np.ones(len(actual), bool)
    return ClassCounts(count(actual, actual == predicted), count(predicted, everywhere), count(actual, everywhere))


def one_vs_rest_auc(
    actual: np.ndarray, scores: np.ndarray, weights: np.ndarray, group_of: np.ndarray | None = None
) -> np.ndarray:
    """Area under the ROC curve of each class against the others, ties counted half.

    Args:
        actual: (N,) classes 0..C-1.
        scores: (N, C), higher means more likely.
        weights: (B, N), how often each tile is in each draw.
        group_of: (N,) what was drawn, if that was groups. A group drawn twice is then compared with others twice as
            often, but with itself once for each time, never with its own copy: copies would make the pairs inside
            groups too many, and the mean over the draws another figure than that of the groups as they are.

    Returns:
        (B, C); NaN where a draw has no tile of the class, or none of the others.
    """
    hits, pairs = one_vs_rest_pairs(actual, scores, weights, group_of)
    with np.errstate(invalid="ignore"):
        return hits / pairs


def one_vs_rest_pairs(
    actual: np.ndarray, scores: np.ndarray, weights: np.ndarray, group_of: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What `one_vs_rest_auc` divides, to be summed over folds first; arguments as there.

    Returns:
        Of the pairs of a tile of the class and one of another, those that the first wins and all there are: (B, C)
        each.
    """
    columns = [_binary_pairs(actual == label, scores[:, label], weights, group_of) for label in range(scores.shape[1])]
    hits, pairs = np.stack(columns, axis=2)
    return hits, pairs


def _binary_pairs(
    positive: np.ndarray, score: np.ndarray, weights: np.ndarray, group_of: np.ndarray | None
) -> np.ndarray:
    """(2, B): pairs won, and all pairs."""
    first, won, there = _pairs_inside(positive, score, group_of)
    order = np.argsort(score, kind="stable")
    ranked, positive = score[order], positive[order]
    tied = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))  # where each run of equal scores begins
    result = np.empty((2, len(weights)))
    for start in range(0, len(weights), _CHUNK):
        weight = weights[start : start + _CHUNK, order].astype(np.float64)
        above = np.add.reduceat(weight * positive, tied, axis=1)
        below = np.add.reduceat(weight * ~positive, tied, axis=1)
        beaten = np.cumsum(below, axis=1) - below / 2
        pairs = above.sum(axis=1) * below.sum(axis=1)
        times = weights[start : start + _CHUNK, first].astype(np.float64)
        copies = times * times - times
        hits = (above * beaten).sum(axis=1)
        result[:, start : start + _CHUNK] = hits - copies @ won, pairs - copies @ there
    return result


def _pairs_inside(
    positive: np.ndarray, score: np.ndarray, group_of: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each group that has both: the place of one of its tiles, the pairs that the positive wins, and all pairs."""
    first, won, there = [], [], []
    mixed: Any = [] if group_of is None else np.intersect1d(group_of[positive], group_of[~positive])
    for group in mixed:
        places = np.flatnonzero(group_of == group)
        ours, theirs = score[places[positive[places]], None], score[places[~positive[places]]]
        first.append(places[0])
        won.append((ours > theirs).sum() + (ours == theirs).sum() / 2)
        there.append(ours.size * theirs.size)
    return np.array(first, dtype=np.int64), np.array(won, dtype=np.float64), np.array(there, dtype=np.float64)


def estimate_metrics(actual: np.ndarray, scores: np.ndarray, resampling: Resampling) -> dict[str, Estimate]:
    """macro_f1, balanced_accuracy, accuracy and auc (macro, one against the rest), with their draws.

    Args:
        actual: (N,) classes 0..C-1.
        scores: (S, N, C), for each seed the score of each tile for each class; the highest is the prediction.
        resampling: the draws over these N tiles.
    """
    per_seed = [_all_draws(actual, seed_scores, resampling) for seed_scores in scores]
    return {
        name: resampling.estimate(
            [values[name][0] for values in per_seed], np.stack([values[name][1:] for values in per_seed])
        )
        for name in per_seed[0]
    }


def _all_draws(actual: np.ndarray, scores: np.ndarray, resampling: Resampling) -> dict[str, np.ndarray]:
    # The first row is the test set as it is, the others are the draws.
    weights = np.concatenate((np.ones((1, resampling.count), np.float32), resampling.weights))
    counts = count_by_group(actual, scores.argmax(axis=1), resampling.group_of, resampling.count, scores.shape[1])
    drawn = ClassCounts(weights @ counts.hits, weights @ counts.predicted, weights @ counts.actual)
    auc = one_vs_rest_auc(actual, scores, weights[:, resampling.group_of], resampling.group_of)
    return {**drawn.scores(), "auc": mean_of_known(auc)}


def class_table(
    actual: np.ndarray, scores: np.ndarray, classes: tuple[str, ...], group_of: np.ndarray
) -> list[dict]:
    """One row per class: tiles, groups, and precision, recall, F1 and AUC, each the mean over seeds.

    Args:
        actual: (N,) classes 0..C-1.
        scores: (S, N, C).
        classes: C names.
        group_of: (N,) groups as numbers.
    """
    everyone = np.ones((1, len(actual)))
    auc = np.mean([one_vs_rest_auc(actual, seed_scores, everyone)[0] for seed_scores in scores], axis=0)
    confusion = np.stack([confusion_matrix(actual, seed_scores) for seed_scores in scores])
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    predicted, there = confusion.sum(axis=1), confusion.sum(axis=2)
    precision = np.divide(hits, predicted, out=np.zeros(hits.shape), where=predicted > 0)
    columns = {"precision": precision, "recall": hits / there, "f1": 2 * hits / (predicted + there)}
    return [
        {
            "class": name,
            "tiles": int(there[0, place]),
            "groups": len(np.unique(group_of[actual == place])),
            **{key: float(column[:, place].mean()) for key, column in columns.items()},
            "auc": float(auc[place]),
        }
        for place, name in enumerate(classes)
    ]


def confusion_matrix(actual: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(C, C) counts for (N,) classes and (N, C) scores: rows are the true classes, columns the predicted ones."""
    classes = scores.shape[1]
    cells = actual * classes + scores.argmax(axis=1)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)
