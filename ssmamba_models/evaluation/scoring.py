"""The scores of one encoder on one task: each method on the same folds and the same bootstrap draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ssmamba_models.data.labelled import LabelledTiles
from ssmamba_models.evaluation.bootstrap import Estimate, Resampling, compare
from ssmamba_models.evaluation.class_metrics import class_table, confusion_matrix, estimate_metrics
from ssmamba_models.evaluation.few_shot import FewShot, few_shot, prototypes
from ssmamba_models.evaluation.folds import Fold, Protocol, make_protocol
from ssmamba_models.evaluation.knn import knn
from ssmamba_models.evaluation.linear_probe import MAX_ITERATIONS, linear_probe
from ssmamba_models.evaluation.settings import Settings
from ssmamba_models.evaluation.tasks import Task

METHODS = ("linear_probe", "knn", "prototypes")


class TaskData:
    """What every encoder's scores on a task share.

    Args:
        tiles: all tiles that every encoder could read.
        task: the task.
        settings: folds, seeds and draws.

    Attributes:
        task, protocol, resampling: the task, its folds and the draws over the scored tiles.
        labels: (N,) classes 0..C-1 of all tiles, -1 for classes of no concern.
        units: (N,) groups of all tiles.
    """

    def __init__(self, tiles: LabelledTiles, task: Task, settings: Settings):
        self.task = task
        self.protocol: Protocol = make_protocol(tiles, task, settings.folds, settings.seeds)
        number = {name: place for place, name in enumerate(task.classes)}
        self.labels = np.array([number.get(name, -1) for name in tiles.known_labels])
        self.units = np.asarray(tiles.units)
        test = self.protocol.test
        self.resampling = Resampling(self.units[test], self.labels[test], settings.seeds, settings.draws)

    @property
    def test_labels(self) -> np.ndarray:
        """(M,) classes of the scored tiles."""
        return self.labels[self.protocol.test]


@dataclass(frozen=True)
class MethodScores:
    """How well a method did with an encoder's features.

    Attributes:
        estimates: macro_f1, balanced_accuracy, accuracy and auc; with folds each is over the tiles of all at once,
            though the scores of two folds' probes need not agree in scale.
        table: a row per class, see `class_table`.
        confusion: (C, C) counts, summed over seeds.
        scores: (S, M, C), each scored tile's score for each class.
        notes: what a reader should know.
    """

    estimates: dict[str, Estimate]
    table: list[dict]
    confusion: np.ndarray
    scores: np.ndarray
    notes: list[str]


@dataclass(frozen=True)
class EncoderScores:
    """An encoder's scores on a task: method -> scores, few-shot by rising K, and magnification if it was asked for."""

    methods: dict[str, MethodScores]
    shots: list[FewShot]
    magnification: dict[str, dict[str, Estimate]] | None = None

    def estimates(self) -> dict[tuple[str, str], Estimate]:
        """(method, metric) -> estimate, of everything that encoders are compared by."""
        named = {name: scores.estimates for name, scores in self.methods.items()}
        named |= {f"{entry.shots}-shot": entry.estimates for entry in self.shots}
        named |= {f"magnification, {name}": columns for name, columns in (self.magnification or {}).items()}
        return {(name, metric): estimate for name, columns in named.items() for metric, estimate in columns.items()}


def score_encoder(data: TaskData, features: Sequence[np.ndarray], settings: Settings) -> EncoderScores:
    """Score an encoder.

    Args:
        data: the task.
        features: for each seed the features of all tiles, (N, D).
        settings: neighbours and episodes.
    """
    methods = {name: _score_method(data, features, name, settings) for name in METHODS}
    shots = few_shot(features, data.labels, data.units, data.protocol, data.resampling, settings.episodes)
    return EncoderScores(methods, shots)


def _score_method(data: TaskData, features: Sequence[np.ndarray], method: str, settings: Settings) -> MethodScores:
    test, classes = data.protocol.test, len(data.task.classes)
    scores = np.zeros((len(data.protocol.seeds), len(test), classes))
    fits = stopped = 0
    for seed, folds in enumerate(data.protocol.seeds):
        for fold in folds:
            answer, converged = _apply(method, data, features[seed], fold, settings)
            scores[seed, np.searchsorted(test, fold.test)] = answer
            fits, stopped = fits + 1, stopped + (not converged)
    labels = data.test_labels
    return MethodScores(
        estimates=estimate_metrics(labels, scores, data.resampling),
        table=class_table(labels, scores, data.task.classes, data.resampling.group_of),
        confusion=np.sum([confusion_matrix(labels, seed_scores) for seed_scores in scores], axis=0),
        scores=scores,
        notes=[f"{stopped} of {fits} fits stopped at {MAX_ITERATIONS} iterations, not converged"] if stopped else [],
    )


def _apply(
    method: str, data: TaskData, features: np.ndarray, fold: Fold, settings: Settings
) -> tuple[np.ndarray, bool]:
    train, labels, test = features[fold.train], data.labels[fold.train], features[fold.test]
    if method == "linear_probe":
        return linear_probe(train, labels, test)
    if method == "knn":
        return knn(train, labels, test, settings.neighbours), True
    return prototypes(train, labels, test), True


def compare_encoders(scores: dict[str, EncoderScores]) -> list[dict]:
    """Every pair of encoders, by every method and metric: first, second, method, metric and what `compare` gives."""
    rows = []
    for first, second in combinations(scores, 2):
        ours, theirs = scores[first].estimates(), scores[second].estimates()
        rows += [
            {"first": first, "second": second, "method": method, "metric": metric} | compare(estimate, other)
            for (method, metric), estimate in ours.items()
            if (other := theirs.get((method, metric))) is not None
        ]
    return rows
