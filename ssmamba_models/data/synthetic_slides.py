"""Synthetic slides as feature files, with labels: for examples and tests of multiple-instance learning.

Features are noise; in positive slides a spot of 5 to 10 % of the tiles is shifted. No tissue is behind them.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

from ssmamba_models.data.features import write_slide_features

_TILE, _MPP = 224, 0.5


def write_synthetic_slides(
    folder: str | os.PathLike,
    patients: int = 30,
    tiles: int = 200,
    feature_dim: int = 32,
    shift: float = 2.0,
    classes: tuple[str, ...] = ("negative", "positive"),
    seed: int = 0,
) -> Path:
    """Write feature files `<slide>.h5` of synthetic slides, and `labels.csv` beside them.

    Every patient has one or two slides of one class. A class other than the first has its own direction, in which the
    features of a round spot, 5 to 10 % of a slide's tiles, are shifted.

    Args:
        folder: made if missing.
        patients: number of patients, spread evenly over the classes.
        tiles: of the smallest slide; the largest has half as many again.
        feature_dim: D.
        shift: of the spot's features, in standard deviations of the noise, in each of D / 4 channels.
        classes: their names; the first one is without a spot.
        seed: the same seed writes the same slides.

    Returns:
        The path of labels.csv (slide, label, patient).

    Raises:
        OSError: the folder cannot be written, or holds such files already.
        ImportError: h5py is missing.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    directions = np.zeros((len(classes), feature_dim))
    for direction in directions[1:]:
        direction[rng.choice(feature_dim, max(1, feature_dim // 4), replace=False)] = shift
    rows = []
    for patient in range(patients):
        label = patient % len(classes)
        for number in range(1 + patient // len(classes) % 2):
            slide = f"slide_{patient:03d}_{number}"
            features, coords = _slide(rng, int(tiles * rng.uniform(1, 1.5)), directions[label])
            _write(root / f"{slide}.h5", slide, features, coords)
            rows.append((slide, classes[label], f"patient_{patient:03d}"))
    with open(root / "labels.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("slide", "label", "patient"), *rows])
    return root / "labels.csv"


def _slide(rng: np.random.Generator, tiles: int, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and places (columns and rows) of a round piece of tissue with a spot in it."""
    side = int(np.ceil(np.sqrt(tiles) * 1.2)) + 1
    rows, columns = np.divmod(np.arange(side * side), side)
    from_middle = np.hypot(rows - side / 2, (columns - side / 2))
    kept = np.sort(np.argsort(from_middle, kind="stable")[:tiles])
    places = np.stack((columns[kept], rows[kept]), axis=1)
    centre = places[rng.integers(tiles)]
    spot = np.argsort(np.hypot(*(places - centre).T), kind="stable")[: round(tiles * rng.uniform(0.05, 0.1))]
    features = rng.standard_normal((tiles, len(direction)))
    features[spot] += direction
    return features, places


def _write(path: Path, slide: str, features: np.ndarray, places: np.ndarray) -> None:
    side = _TILE * 2
    width, height = ((places.max(axis=0) + 2) * side).tolist()
    geometry = {
        "patch_size": _TILE,
        "patch_size_level0": side,
        "overlap": 0,
        "level0_mpp": _MPP / 2,
        "target_mpp": _MPP,
        "level0_width": width,
        "level0_height": height,
        "name": slide,
    }
    attributes = {"model": "synthetic", "weights_sha256": "none"}
    with write_slide_features(
        path, features.shape[1], coords_attributes=geometry, attributes=attributes
    ) as writer:
        writer.append(features.astype(np.float32), places * side)
