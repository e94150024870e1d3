"""k nearest neighbours: whether tiles of one class lie together, without any training."""

from __future__ import annotations

import numpy as np

NEIGHBOURS = 20


def unit_vectors(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(N, D) features minus (D,) centre, each scaled to length 1; a zero vector stays zero."""
    centred = features - centre
    return centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)


def knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Score tiles by a vote of their nearest training tiles, in centred features of length 1.

    Args:
        train: (N, D) features to learn from; their mean is the centre.
        labels: (N,) their classes, 0..C-1, each there.
        test: (M, D) features to score.
        neighbours: k; all training tiles where there are fewer.

    Returns:
        (M, C) shares of the votes.
    """
    from sklearn.neighbors import KNeighborsClassifier

    centre = train.mean(axis=0)
    voters = KNeighborsClassifier(min(neighbours, len(train)), algorithm="brute")
    voters.fit(unit_vectors(train, centre), labels)
    return voters.predict_proba(unit_vectors(test, centre))
