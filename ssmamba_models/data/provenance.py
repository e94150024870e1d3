"""What must be equal for features of several slides to be used together: the encoder, its input, the tiles' size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

ENCODER = ("model", "weights_sha256", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "dtype")
TILES = ("patch_size", "overlap", "target_mpp")
# The mpp of files from elsewhere follow from rounded sizes; a percent is less than two scans of one scanner differ.
_MPP_TOLERANCE = 0.01

Key = TypeVar("Key", bound=Hashable)


def feature_provenance(file: Any) -> dict[str, Any]:
    """The provenance of a slide's features: of the encoder what is known, of the tiles all, and the features' length.

    Args:
        file: a `SlideFeatureFile`, or anything with `attributes`, `coords_attributes` and `embed_dim`.
    """
    encoder = {name: file.attributes.get(name) for name in ENCODER}
    return {"embed_dim": file.embed_dim, **encoder, **{name: file.coords_attributes[name] for name in TILES}}


def mixed_provenance(provenances: Mapping[Key, Mapping[str, Any]]) -> dict[Key, list[str]]:
    """Find those files whose provenance is not that of most.

    Args:
        provenances: file -> what `feature_provenance` gives.

    Returns:
        File -> one line for each field in which it differs; files that do not differ are left out. Of equally many, the
        first count as most.
    """
    mixed: dict[Key, list[str]] = {}
    if not provenances:
        return mixed
    for name in ("embed_dim", *ENCODER, *TILES):
        values = {key: provenance.get(name) for key, provenance in provenances.items()}
        counts = Counter(repr(value) for value in values.values())
        usual_text = counts.most_common(1)[0][0]
        usual = next(value for value in values.values() if repr(value) == usual_text)
        for key, value in values.items():
            if not same_provenance(name, value, usual):
                line = f"{name} is {value!r}, but {usual!r} in {counts[usual_text]} files of the folder"
                mixed.setdefault(key, []).append(line)
    return mixed


def same_provenance(name: str, value: Any, usual: Any) -> bool:
    """Whether two files agree in a field: sizes that were computed may differ by what rounding makes of them."""
    if name == "target_mpp":
        return math.isclose(value, usual, rel_tol=_MPP_TOLERANCE)
    return value == usual
