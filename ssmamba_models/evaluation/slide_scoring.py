"""How well slides can be told apart by their vectors, from few labelled slides and from many."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ssmamba_models.evaluation.bootstrap import Estimate, Resampling, compare
from ssmamba_models.evaluation.class_metrics import estimate_metrics, mean_of_known, one_vs_rest_pairs
from ssmamba_models.evaluation.folds import Fold, Protocol, make_protocol
from ssmamba_models.evaluation.knn import NEIGHBOURS, knn
from ssmamba_models.evaluation.slide_data import LabelledSlides
from ssmamba_models.evaluation.tasks import Task, choose_tasks

C = 10.0
MAX_ITERATIONS = 2000


@dataclass(frozen=True)
class SlideSettings:
    """The numbers of an evaluation of slide vectors.

    Attributes:
        folds: patient-wise folds, where the labels have no splits.
        repeats: how often folds and training slides are drawn.
        budgets: training slides: "50", "25%", "all", ...
        neighbours: most neighbours of kNN; never more than a fifth of the training slides, of which else most vote.
        draws: bootstrap draws.

    Raises:
        ValueError: a number is too small, or a budget is none.
    """

    folds: int = 5
    repeats: int = 10
    budgets: tuple[str, ...] = ("50", "100", "25%", "all")
    neighbours: int = NEIGHBOURS
    draws: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("folds", 2), ("repeats", 1), ("neighbours", 1), ("draws", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")
        if not self.budgets or len(set(self.budgets)) < len(self.budgets):
            raise ValueError(f"budgets are {', '.join(self.budgets) or 'none'}, expected one or more, each once")
        for budget in self.budgets:
            budget_size(budget, 100)


def budget_size(budget: str, training: int) -> int:
    """How many of `training` slides a budget is: "50" slides, "25%" of them, or "all".

    Raises:
        ValueError: it is none of these.
    """
    if budget == "all":
        return training
    number = budget.removesuffix("%")
    share = budget.endswith("%")
    if not number.isdecimal() or not 0 < int(number) <= (99 if share else 10**9):
        raise ValueError(f"the budget {budget!r} is no number of training slides; expected such as 50, 25% or all")
    return max(1, round(training * int(number) / 100)) if share else int(number)


@dataclass(frozen=True)
class BudgetScores:
    """How well a method did with some vectors and so many training slides.

    Attributes:
        budget: as in `SlideSettings`.
        train: fewest and most training slides of a fit.
        method: "logistic_regression" or "knn".
        estimates: auc, macro_f1, balanced_accuracy and accuracy.
    """

    budget: str
    train: tuple[int, int]
    method: str
    estimates: dict[str, Estimate]


class SlideTask:
    """What all vectors are scored on.

    Args:
        slides: the slides.
        settings: folds, repetitions and draws.

    Attributes:
        task, protocol, resampling: classes, folds, and the draws of patients over the scored slides.
        labels: (N,) classes 0..C-1.
        left_out: budgets that are not below the training slides of a fold.

    Raises:
        ValueError: as `make_protocol`, or no budget fits.
    """

    def __init__(self, slides: LabelledSlides, settings: SlideSettings):
        table = slides.table
        (self.task,) = choose_tasks(table)
        self.settings = settings
        self.protocol = _protocol(table, self.task, settings)
        self.labels = np.array([self.task.classes.index(name) for name in table.known_labels])
        test = self.protocol.test
        units = np.asarray(table.units)[test]
        self.resampling = Resampling(units, self.labels[test], settings.repeats, settings.draws)
        fewest = min(len(fold.train) for folds in self.protocol.seeds for fold in folds)
        fits = {budget: self._fits(budget, fewest) for budget in settings.budgets}
        self.budgets = tuple(budget for budget, fit in fits.items() if fit)
        self.left_out = tuple(budget for budget, fit in fits.items() if not fit)
        if not self.budgets:
            raise ValueError(
                f"no budget fits: a fit has {fewest} training slides of {len(self.task.classes)} classes, and the "
                f"budgets are {', '.join(settings.budgets)}; give --budgets all"
            )

    def _fits(self, budget: str, fewest: int) -> bool:
        size = budget_size(budget, fewest)
        return budget == "all" or len(self.task.classes) <= size < fewest

    def training(self, budget: str) -> list[list[np.ndarray]]:
        """For each repetition and fold the places of the training slides; a smaller budget is part of a larger."""
        return [
            [self._draw(fold, budget, seed, number) for number, fold in enumerate(folds)]
            for seed, folds in enumerate(self.protocol.seeds)
        ]

    def _draw(self, fold: Fold, budget: str, seed: int, number: int) -> np.ndarray:
        size = budget_size(budget, len(fold.train))
        order = stratified_order(self.labels[fold.train], np.random.default_rng([seed, number]))
        return np.sort(fold.train[order[:size]])


def _protocol(table: Any, task: Task, settings: SlideSettings) -> Protocol:
    if table.splits is None:
        return make_protocol(table, task, settings.folds, settings.repeats, noun="slide")
    once = make_protocol(table, task, settings.folds, 1, noun="slide")
    return Protocol(once.kind, once.seeds * settings.repeats, once.test_split)


def stratified_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order whose every beginning has the classes in about their own proportions, and the first C one of each.

    Args:
        labels: (N,) classes.
        rng: the source of randomness.

    Returns:
        A permutation of 0..N-1.
    """
    key = np.empty(len(labels))
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        key[places] = (np.arange(len(places)) + rng.random()) / len(places)
        key[places[0]] = -1
    return np.argsort(key, kind="stable")


def score_vectors(task: SlideTask, vectors: np.ndarray) -> list[BudgetScores]:
    """Score vectors with every budget and method.

    Args:
        task: the task.
        vectors: (N, E), of length 1.
    """
    scores = []
    for budget in task.budgets:
        training = task.training(budget)
        sizes = [len(places) for folds in training for places in folds]
        for method, fit in _methods(task.settings).items():
            estimates = _estimate(task, _predict(task, vectors, training, fit))
            scores.append(BudgetScores(budget, (min(sizes), max(sizes)), method, estimates))
    return scores


def _methods(settings: SlideSettings) -> dict[str, Callable[..., np.ndarray]]:
    return {
        "logistic_regression": logistic_regression,
        "knn": lambda train, labels, test: knn(train, labels, test, _neighbours(settings, len(train))),
    }


def _neighbours(settings: SlideSettings, train: int) -> int:
    return max(1, min(settings.neighbours, train // 5))


def logistic_regression(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Fit a logistic regression with C = 10 and balanced classes, and score other slides with it.

    Args:
        train: (N, E) vectors of length 1.
        labels: (N,) their classes, 0..C-1, each there.
        test: (M, E).

    Returns:
        (M, C) probabilities.

    Source: Lazard et al., Giga-SSL (arXiv:2212.03273), section 4.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=C, class_weight="balanced", max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # its scores hardly move any more
        return model.fit(train, labels).predict_proba(test)


def _predict(task: SlideTask, vectors: np.ndarray, training: list[list[np.ndarray]], fit: Callable) -> np.ndarray:
    """(S, M, C): in each repetition the scores of each scored slide."""
    test, classes = task.protocol.test, len(task.task.classes)
    scores = np.zeros((len(training), len(test), classes))
    for seed, folds in enumerate(task.protocol.seeds):
        for fold, train in zip(folds, training[seed]):
            answer = fit(vectors[train], task.labels[train], vectors[fold.test])
            scores[seed, np.searchsorted(test, fold.test)] = answer
    return scores


def _estimate(task: SlideTask, scores: np.ndarray) -> dict[str, Estimate]:
    labels, resampling = task.labels[task.protocol.test], task.resampling
    estimates = estimate_metrics(labels, scores, resampling)
    # The models of two folds need not agree in scale: ranks are compared within each.
    weights = np.concatenate((np.ones((1, resampling.count), np.float32), resampling.weights))[:, resampling.group_of]
    rows = [
        _fold_auc(task, folds, labels, scores[seed], weights, resampling.group_of)
        for seed, folds in enumerate(task.protocol.seeds)
    ]
    estimates["auc"] = resampling.estimate([row[0] for row in rows], np.stack([row[1:] for row in rows]))
    return estimates


def _fold_auc(
    task: SlideTask,
    folds: Sequence[Fold],
    labels: np.ndarray,
    scores: np.ndarray,
    weights: np.ndarray,
    patient_of: np.ndarray,
) -> np.ndarray:
    """(1 + B,): the macro AUC over the pairs of slides within each fold, all folds together.

    The first is of the slides as they are, the others of the draws. Pairs are summed before they are divided: a mean
    over folds would favour folds with few drawn patients, where more of the pairs are within a patient.
    """
    hits, pairs = np.zeros((2, len(weights), scores.shape[1]))
    for fold in folds:
        places = np.searchsorted(task.protocol.test, fold.test)
        fold_hits, fold_pairs = one_vs_rest_pairs(
            labels[places], scores[places], weights[:, places], patient_of[places]
        )
        hits += fold_hits
        pairs += fold_pairs
    with np.errstate(invalid="ignore"):
        return mean_of_known(hits / pairs)


def compare_vectors(scores: dict[str, list[BudgetScores]]) -> list[dict]:
    """Every two sets of vectors: first, second, budget, method, metric, and what `compare` gives."""
    rows = []
    for first, second in combinations(scores, 2):
        for ours, theirs in zip(scores[first], scores[second]):
            rows += [
                {"first": first, "second": second, "budget": ours.budget, "method": ours.method, "metric": metric}
                | compare(ours.estimates[metric], theirs.estimates[metric])
                for metric in ("auc", "macro_f1")
            ]
    return rows
