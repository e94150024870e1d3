"""Slides without labels: all feature files of a folder, which must belong together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ssmamba_models.data.bags import Bags, check_same_provenance, feature_files, open_bag


def read_slides(features: str | os.PathLike, unreadable: Callable[[Path, str], None] | None = None) -> Bags:
    """The slides whose feature files lie in a folder; no labels are needed, none are read.

    Args:
        features: folder of feature files, `<slide>.h5`, or one of them.
        unreadable: called with each file that is damaged and the reason; it is left out. None refuses such files.

    Returns:
        The slides, sorted by name.

    Raises:
        FileNotFoundError: there is no such folder, or no feature file in it.
        ValueError: a file is damaged, all are, or they are of different width or provenance.
        ImportError: h5py is missing.
    """
    bags, provenances, reasons = [], {}, []
    for path in feature_files(features):
        try:
            bag, provenances[path.stem] = open_bag(path)
        except (ValueError, OSError) as error:
            if unreadable is None:
                raise
            unreadable(path, str(error))
            reasons.append(str(error))
            continue
        bags.append(bag)
    if not bags:
        raise ValueError(f"no feature file in {os.fspath(features)!r} can be read (first: {reasons[0]})")
    common = check_same_provenance(provenances)
    return Bags(bags[0].path.parent, tuple(bags), common["feature_dim"], common)


def check_finite(features: np.ndarray, slide: str) -> None:
    """Refuse features that are NaN or infinite, which one tile would spread over a whole batch.

    Raises:
        ValueError: they are.
    """
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"the slide {slide!r} has {np.count_nonzero(~finite)} tiles whose features are NaN or infinite (of the "
            f"{len(finite)} read, the first at place {int(np.argmin(finite))}); `ssmamba check` finds all, extract it "
            "again"
        )
