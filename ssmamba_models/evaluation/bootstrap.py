"""Group-level bootstrap: how much a figure would move with other patients, and whether two models really differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and what it was in each bootstrap draw.

    Attributes:
        value: the figure itself, the mean over seeds.
        draws: (B,) the figure in each draw.
        seeds: the figure for each seed.
    """

    value: float
    draws: np.ndarray
    seeds: tuple[float, ...]

    def interval(self) -> tuple[float, float]:
        """The 95 % percentile interval."""
        return _percentile_interval(self.draws)

    def as_dict(self) -> dict:
        """value, low, high and seeds, for JSON."""
        low, high = self.interval()
        return {"value": self.value, "low": low, "high": high, "seeds": list(self.seeds)}


def _percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(draws, (tail, 100 - tail))
    return float(low), float(high)


class Resampling:
    """B draws of groups and of seeds, made once and used for every model, so that models can be compared draw by draw.

    Each draw takes groups with replacement, class by class, and seeds with replacement. A group of several classes
    counts for the one that has the fewest groups, so a draw can lose a class only if all groups of that class count
    for others. Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; groups, because tiles of one
    patient are no independent witnesses.

    Args:
        groups: N names, the group of each scored tile.
        labels: N class names.
        seeds: S, number of seeds.
        draws: B.
        seed: makes the draws the same in each run.

    Attributes:
        group_of: (N,) the number of each tile's group, 0..G-1.
        weights: (B, G) float32: how often each group is in each draw.
        seed_weights: (B, S): the share of each seed in each draw.
    """

    def __init__(self, groups: Sequence[str], labels: Sequence[str], seeds: int = 1, draws: int = 1000, seed: int = 0):
        names, self.group_of = np.unique(np.asarray(groups), return_inverse=True)
        self.count = len(names)
        rng = np.random.default_rng(seed)
        self.weights = np.zeros((draws, self.count), np.float32)
        for members in _strata(self.group_of, labels, self.count):
            self.weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), draws)
        self.seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds

    def estimate(self, values: Sequence[float] | np.ndarray, draws: np.ndarray) -> Estimate:
        """Join the seeds of a figure.

        Args:
            values: S figures, one for each seed.
            draws: (S, B), the same in each draw of groups.
        """
        joined = (self.seed_weights.T * draws).sum(axis=0)
        return Estimate(float(np.mean(values)), joined, tuple(float(value) for value in values))

    def mean(self, values: np.ndarray) -> Estimate:
        """The mean of a quantity over tiles.

        Args:
            values: (S, N), one value for each seed and tile.
        """
        sizes = np.bincount(self.group_of, minlength=self.count)
        sums = np.stack([np.bincount(self.group_of, row, minlength=self.count) for row in values])
        return self.estimate(values.mean(axis=1), (sums @ self.weights.T) / (self.weights @ sizes))

    def median(self, values: np.ndarray) -> Estimate:
        """The (lower) median of a quantity over tiles; arguments as `mean`."""
        weights = np.concatenate((np.ones((1, self.count), np.float32), self.weights))
        medians = np.stack([_weighted_medians(row, weights[:, self.group_of]) for row in values])
        return self.estimate(medians[:, 0], medians[:, 1:])


def _weighted_medians(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N,) values and (B, N) weights -> (B,)."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[:, order], axis=1)
    return values[order][(below >= below[:, -1:] / 2).argmax(axis=1)]


def _strata(group_of: np.ndarray, labels: Sequence[str], count: int) -> list[np.ndarray]:
    """Of each class its groups; a group of several classes counts for the one that has the fewest groups."""
    classes_of: list[set[str]] = [set() for _ in range(count)]
    for group, label in zip(group_of, labels):
        classes_of[group].add(label)
    frequency = Counter(label for classes in classes_of for label in classes)
    rarest = np.array([min(classes, key=lambda label: (frequency[label], label)) for classes in classes_of])
    return [np.flatnonzero(rarest == label) for label in np.unique(rarest)]


def compare(first: Estimate, second: Estimate) -> dict:
    """The difference of a figure between two models that were scored on the same tiles with the same draws.

    Args:
        first, second: estimates from one `Resampling`.

    Returns:
        difference (first - second), low and high (95 %), and p: twice the share of draws on the rarer side of 0,
        ties on both sides, at most 1 and at least 2 / (B + 1): so many draws cannot tell more.
    """
    difference = first.draws - second.draws
    low, high = _percentile_interval(difference)
    known = difference[~np.isnan(difference)]
    rarer = min(np.count_nonzero(known <= 0), np.count_nonzero(known >= 0))
    p = min(1.0, 2 * (rarer + 1) / (len(known) + 1))
    return {"difference": first.value - second.value, "low": low, "high": high, "p": float(p)}
