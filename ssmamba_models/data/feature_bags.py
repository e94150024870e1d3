"""Bags of shared augmentation in a slide feature file: features of tiles that were all augmented in the same way.

Layout: `bags/features` (A, n, D) of the type of the file's features, and `bags/coords` (A, n, 2) int64 as `coords`; the
tiles of a bag were drawn from those of the file, with replacement, and given to the encoder under one augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

GROUP = "bags"
BAG_FEATURES, BAG_COORDS = f"{GROUP}/features", f"{GROUP}/coords"


class FeatureBags(Sequence):
    """The bags of an open slide feature file; one is read when it is asked for.

    Attributes:
        features: (A, n, D) data set.
        coords: (A, n, 2) data set.

    Index: a bag's number -> features (n, D), as stored, and coords (n, 2) int64; a slice of them with an axis more.
    """

    def __init__(self, file: Any) -> None:
        self.features, self.coords = file[BAG_FEATURES], file[BAG_COORDS]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, bag: int | slice) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(bag, slice):
            return self.features[bag], self.coords[bag].astype(np.int64, copy=False)
        if not -len(self) <= bag < len(self):
            raise IndexError(f"there is no bag {bag}; the file has {len(self)}")
        bag %= len(self)
        return self.features[bag], self.coords[bag].astype(np.int64, copy=False)


def find_bags(file: Any, name: str) -> FeatureBags | None:
    """The bags of an open file whose `features` are checked, or None where it has none.

    Args:
        file: the open `h5py.File`.
        name: for messages.

    Raises:
        ValueError: the group is incomplete, or its shapes or types do not fit each other or the file.
    """
    if GROUP not in file:
        return None
    for path in (BAG_FEATURES, BAG_COORDS):
        # A group has no shape.
        if not hasattr(file.get(path), "shape"):
            raise ValueError(f"{name!r} has bags of shared augmentation, but no data set {path!r}; extract it again")
    bags, width = FeatureBags(file), file["features"].shape[1]
    shape, places = bags.features.shape, bags.coords.shape
    if len(shape) != 3 or shape[2] != width or 0 in shape:
        raise ValueError(f"{name!r}: {BAG_FEATURES} have shape {shape}, expected (A, n, {width}), none of them 0")
    if places != (*shape[:2], 2):
        raise ValueError(f"{name!r}: {BAG_COORDS} have shape {places}, expected {(*shape[:2], 2)}")
    if bags.features.dtype not in (np.float32, np.float16):
        raise ValueError(f"{name!r}: {BAG_FEATURES} are {bags.features.dtype}, expected float32 or float16")
    if bags.coords.dtype.kind not in "iu":
        raise ValueError(f"{name!r}: {BAG_COORDS} are {bags.coords.dtype}, expected int64")
    return bags
