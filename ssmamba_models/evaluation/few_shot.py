"""SimpleShot: classification by the nearest class mean, from all training tiles or from a few.

Source: Wang et al., "SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot Learning", arXiv:1911.04623.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ssmamba_models.evaluation.bootstrap import Estimate, Resampling
from ssmamba_models.evaluation.class_metrics import ClassCounts, count_by_group
from ssmamba_models.evaluation.folds import Fold, Protocol
from ssmamba_models.evaluation.knn import unit_vectors

EPISODES = 300
MOST_SHOTS = 128
# Episodes worked out together: memory against speed.
_CHUNK = 32


@dataclass(frozen=True)
class FewShot:
    """What K labelled tiles per class give.

    Attributes:
        shots: K.
        estimates: the mean over episodes of macro_f1, balanced_accuracy and accuracy, each over the tiles of all
            folds at once; draws are of test groups.
        spread: for each metric, the 2.5th and 97.5th percentile of the episodes, each on the tiles of its fold: what
            one choice of tiles may give.
    """

    shots: int
    estimates: dict[str, Estimate]
    spread: dict[str, tuple[float, float]]


def prototypes(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Score tiles by their distance to the class means of centred training features of length 1.

    Args:
        train: (N, D) features to learn from; their mean is the centre.
        labels: (N,) their classes, 0..C-1, each there.
        test: (M, D) features to score.

    Returns:
        (M, C) scores: minus the squared distance.
    """
    centre = train.mean(axis=0)
    unit = unit_vectors(train, centre)
    means = np.stack([unit[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    query = unit_vectors(test, centre)
    return 2 * query @ means.T - (means**2).sum(axis=1) - (query**2).sum(axis=1, keepdims=True)


def shot_counts(labels: np.ndarray, units: np.ndarray) -> list[int]:
    """1, 2, 4, ... up to the number of groups of the class that has fewest, and to 128."""
    fewest = min(len(np.unique(units[labels == label])) for label in range(labels.max() + 1))
    return [2**power for power in range(MOST_SHOTS.bit_length()) if 2**power <= min(fewest, MOST_SHOTS)]


def draw_episodes(
    labels: np.ndarray, units: np.ndarray, shots: int, episodes: int, rng: np.random.Generator
) -> np.ndarray:
    """Choose K tiles of each class, each from another group.

    Args:
        labels: (N,) classes 0..C-1.
        units: (N,) groups.
        shots: K, at most the number of groups of any class.
        episodes: E.
        rng: the source of randomness.

    Returns:
        (E, C, K) places in 0..N-1.
    """
    columns = []
    for label in range(labels.max() + 1):
        places = np.flatnonzero(labels == label)
        _, group_of = np.unique(units[places], return_inverse=True)
        places = places[np.argsort(group_of, kind="stable")]
        sizes = np.bincount(group_of)
        starts = np.cumsum(sizes) - sizes
        drawn = np.stack([rng.choice(len(sizes), shots, replace=False) for _ in range(episodes)])
        within = (rng.random(drawn.shape) * sizes[drawn]).astype(np.int64)
        columns.append(places[starts[drawn] + within])
    return np.stack(columns, axis=1)


def _predict(train: np.ndarray, chosen: np.ndarray, test: np.ndarray) -> np.ndarray:
    """(E, C, K) places in `train` (N, D) -> (E, M) predicted classes of `test` (M, D)."""
    support = train[chosen]
    centre = support.mean(axis=(1, 2), keepdims=True)
    unit = support - centre
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True).clip(1e-12)
    means = unit.mean(axis=2)
    centre = centre[:, 0, 0]
    # |(q - c) / |q - c| - p|^2 without forming q - c for each episode: only its dot products are needed.
    lengths = (test**2).sum(axis=1) - 2 * centre @ test.T + (centre**2).sum(axis=1, keepdims=True)
    along = means @ test.T - np.einsum("ecd,ed->ec", means, centre)[..., None]
    closeness = along / np.sqrt(lengths.clip(1e-24))[:, None] - (means**2).sum(axis=-1)[..., None] / 2
    return closeness.argmax(axis=1)


def few_shot(
    features: Sequence[np.ndarray],
    labels: np.ndarray,
    units: np.ndarray,
    protocol: Protocol,
    resampling: Resampling,
    episodes: int = EPISODES,
) -> list[FewShot]:
    """Score K-shot episodes for K = 1, 2, 4, ...: support from training tiles, all test tiles as queries.

    An episode sees nothing but its K tiles per class, of K different groups: their mean is the centre too.

    Args:
        features: for each seed (N, D).
        labels: (N,) classes 0..C-1 (-1 for tiles of no class of the task).
        units: (N,) groups.
        protocol: folds; with several folds the episodes are shared out among them, and the first episodes of all
            folds are scored together, then the second, and so on.
        resampling: draws over `protocol.test`.
        episodes: E for each seed.

    Returns:
        One entry per K, K rising.
    """
    counts = [shot_counts(labels[fold.train], units[fold.train]) for folds in protocol.seeds for fold in folds]
    return [
        _score_shots(shots, features, labels, units, protocol, resampling, episodes)
        for shots in min(counts, key=len)
    ]


def _score_shots(
    shots: int,
    features: Sequence[np.ndarray],
    labels: np.ndarray,
    units: np.ndarray,
    protocol: Protocol,
    resampling: Resampling,
    episodes: int,
) -> FewShot:
    per_seed, alone = [], []
    for seed, folds in enumerate(protocol.seeds):
        rng = np.random.default_rng([seed, shots])
        share = -(-episodes // len(folds))
        common = (features[seed], labels, units, protocol.test, resampling, shots, share, rng)
        rows = []
        for chunk in zip(*(_fold_counts(fold, *common) for fold in folds)):
            # All folds together: the draws keep the classes of the whole test set, not those of each fold.
            rows.append(_sum_counts(chunk).scores())
            alone += [ClassCounts(fold.hits[:, 0], fold.predicted[:, 0], fold.actual[:, 0]).scores() for fold in chunk]
        per_seed.append({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    estimates, spread = {}, {}
    for name in per_seed[0]:
        # Column 0 is the test set as it is, the others are the draws.
        means = np.stack([scores[name].mean(axis=0) for scores in per_seed])
        estimates[name] = resampling.estimate(means[:, 0], means[:, 1:])
        low, high = np.percentile(np.concatenate([scores[name] for scores in alone]), (2.5, 97.5))
        spread[name] = (float(low), float(high))
    return FewShot(shots, estimates, spread)


def _fold_counts(
    fold: Fold,
    features: np.ndarray,
    labels: np.ndarray,
    units: np.ndarray,
    scored: np.ndarray,
    resampling: Resampling,
    shots: int,
    episodes: int,
    rng: np.random.Generator,
) -> Iterator[ClassCounts]:
    """For chunks of episodes: counts of (episodes, 1 + B, C), of the fold as it is and of its part of each draw."""
    # The result does not depend on where the origin is; near the tiles, float32 loses least.
    origin = features[fold.train].mean(axis=0)
    train, test = features[fold.train] - origin, features[fold.test] - origin
    present, group_of = np.unique(resampling.group_of[np.searchsorted(scored, fold.test)], return_inverse=True)
    weights = np.concatenate((np.ones((1, len(present)), np.float32), resampling.weights[:, present]))
    chosen = draw_episodes(labels[fold.train], units[fold.train], shots, episodes, rng)
    for start in range(0, episodes, _CHUNK):
        predicted = _predict(train, chosen[start : start + _CHUNK], test)
        yield _weighted_counts(labels[fold.test], predicted, group_of, weights, int(labels.max()) + 1)


def _weighted_counts(
    actual: np.ndarray, predicted: np.ndarray, group_of: np.ndarray, weights: np.ndarray, classes: int
) -> ClassCounts:
    groups = weights.shape[1]
    counts = [count_by_group(actual, row, group_of, groups, classes) for row in predicted]
    hits = weights @ np.stack([count.hits for count in counts])
    seen = weights @ np.stack([count.predicted for count in counts])
    return ClassCounts(hits, seen, np.broadcast_to(weights @ counts[0].actual, hits.shape))


def _sum_counts(parts: Sequence[ClassCounts]) -> ClassCounts:
    return ClassCounts(
        np.sum([part.hits for part in parts], axis=0),
        np.sum([part.predicted for part in parts], axis=0),
        np.sum([part.actual for part in parts], axis=0),
    )
