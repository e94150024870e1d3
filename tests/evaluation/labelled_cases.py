"""Tiles that exist by name alone, and features of them: what scoring needs without reading images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ssmamba_models.data.labelled import LabelledTiles


def named_tiles(labels, groups=None, splits=None) -> LabelledTiles:
    """Tiles t00000, t00001, ... with these labels."""
    columns = (None if column is None else tuple(map(str, column)) for column in (labels, groups, splits))
    return LabelledTiles(Path("tiles"), tuple(f"t{place:05}.png" for place in range(len(labels))), *columns)


def grouped_tiles(groups_per_class=12, tiles_per_group=4, classes=("a", "b", "c"), val_share=None):
    """Tiles whose groups are of one class each; with `val_share`, that share of each class's groups is "val"."""
    labels, groups, splits = [], [], []
    for name in classes:
        for group in range(groups_per_class):
            held_out = val_share is not None and group < val_share * groups_per_class
            labels += [name] * tiles_per_group
            groups += [f"{name}{group}"] * tiles_per_group
            splits += ["val" if held_out else "train"] * tiles_per_group
    return named_tiles(labels, groups, splits if val_share is not None else None)


def features_of(labels, distance, embed_dim=16, seed=0) -> np.ndarray:
    """Gaussian features, the classes' centres `distance` apart (0: the features know nothing)."""
    rng = np.random.default_rng(seed)
    names, number = np.unique(np.asarray(labels), return_inverse=True)
    centres = np.eye(len(names), embed_dim) * distance
    return (rng.normal(size=(len(labels), embed_dim)) + centres[number]).astype(np.float32)
