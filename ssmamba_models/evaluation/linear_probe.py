"""Linear probe: what a linear classifier can read out of frozen features."""

from __future__ import annotations

import warnings

import numpy as np

MAX_ITERATIONS = 1000


def linear_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, bool]:
    """Fit a logistic regression by L-BFGS with C = D * classes / 100, and score other tiles with it.

    That C (an l2 weight of 100 / (D * classes)) is the convention of the pathology literature: Chen et al., "Towards a
    general-purpose foundation model for computational pathology", Nature Medicine 2024. Each feature is standardised
    with the training tiles' mean and deviation: C means the same for every encoder only if features have one scale.

    Args:
        train: (N, D) features to learn from.
        labels: (N,) their classes, 0..C-1, each there.
        test: (M, D) features to score.

    Returns:
        (M, C) probabilities, and whether L-BFGS converged within 1000 iterations.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.astype(np.float64))
    classes = int(labels.max()) + 1
    probe = LogisticRegression(C=train.shape[1] * classes / 100, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe.fit(scaler.transform(train.astype(np.float64)), labels)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return probe.predict_proba(scaler.transform(test.astype(np.float64))), converged
