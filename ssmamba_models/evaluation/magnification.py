"""Magnification: does an encoder know the same tissue again at half the resolution?

A tile is seen twice: at the encoder's input size S, and at S / 2 px of the same field, where each pixel spans twice
the micrometres, as a scanner of half the magnification would deliver it (down-sampled with an antialiasing filter;
nothing is scaled up again). The second image is fed as it is, so the network, too, sees half as many pixels a side.
Networks of one fixed input size are made anew for S / 2: with published weights, timm resamples the position table;
your own weights have to fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssmamba_models.evaluation.bootstrap import Estimate, Resampling
from ssmamba_models.evaluation.knn import unit_vectors

MOST_TILES = 2000
RECALLS = (1, 10)


def spread_places(places: np.ndarray, most: int = MOST_TILES) -> np.ndarray:
    """At most so many of the places, evenly spread."""
    if len(places) <= most:
        return places
    return places[np.linspace(0, len(places) - 1, most).round().astype(int)]


def match_halves(full: np.ndarray, half: np.ndarray, units: np.ndarray, centred: bool) -> dict[str, np.ndarray]:
    """Compare each tile's features with the half-resolution features of itself and of all tiles of other groups.

    Tiles of the same group are no candidates: they may show the same tissue, and finding one is no mistake.

    Args:
        full: (N, D) features at full resolution.
        half: (N, D) features of the same tiles at half resolution.
        units: (N,) groups. A tile without others to be mixed up with has rank 1 and `other_cosine` 0.
        centred: subtract each resolution's mean first, which takes out what a resolution adds to every tile.

    Returns:
        For each tile, (N,): `pair_cosine` (with itself at half resolution), `other_cosine` (mean over tiles of
        other groups), `rank` (1: the nearest of the candidates is itself; ties count half) and `recall_at_1`,
        `recall_at_10`.
    """
    zero = np.zeros(full.shape[1], full.dtype)
    queries = unit_vectors(full, full.mean(axis=0) if centred else zero)
    targets = unit_vectors(half, half.mean(axis=0) if centred else zero)
    cosine = queries @ targets.T
    pair = np.diagonal(cosine).copy()
    other = units[:, None] != units[None, :]
    nearer = ((cosine > pair[:, None]) & other).sum(axis=1) + ((cosine == pair[:, None]) & other).sum(axis=1) / 2
    return {
        "pair_cosine": pair,
        "other_cosine": np.where(other, cosine, 0).sum(axis=1) / np.maximum(other.sum(axis=1), 1),
        "rank": 1 + nearer,
        **{f"recall_at_{count}": (nearer < count).astype(float) for count in RECALLS},
    }


def score_magnification(
    full: Sequence[np.ndarray], half: Sequence[np.ndarray], units: np.ndarray, resampling: Resampling
) -> dict[str, dict[str, Estimate]]:
    """What `match_halves` gives, over all tiles.

    Args:
        full, half: for each seed (N, D).
        units: (N,) groups.
        resampling: draws over these N tiles.

    Returns:
        "plain" and "centred" -> pair_cosine, other_cosine, mean_rank, median_rank, recall_at_1, recall_at_10.
    """
    scored = {}
    for name, centred in (("plain", False), ("centred", True)):
        tables = [match_halves(first, second, units, centred) for first, second in zip(full, half)]
        columns = {column: np.stack([table[column] for table in tables]) for column in tables[0]}
        ranks = columns.pop("rank")
        scored[name] = {
            **{column: resampling.mean(values) for column, values in columns.items()},
            "mean_rank": resampling.mean(ranks),
            "median_rank": resampling.median(ranks),
        }
    return scored
