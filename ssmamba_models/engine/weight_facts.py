"""What a weight file says of itself, in types that can be used."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WeightFacts:
    """The metadata of a weight file; what it does not say has the default.

    Attributes:
        model: timm name, "" if unsaid.
        model_args: what the model was created with beside its name.
        img_size: side of the input that it was trained at, in pixels; None if unsaid.
        classes: names of the classifier's classes.
    """

    model: str = ""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    img_size: int | None = None
    classes: tuple[str, ...] = ()


def weight_facts(metadata: Mapping[str, str], path: str | os.PathLike) -> WeightFacts:
    """Read the metadata that `read_weights` gave.

    Args:
        path: what the messages call the weights.

    Raises:
        ValueError: a value is not of its kind.
    """
    size = _read(metadata, "img_size", int, path)
    if size is not None and size < 1:
        raise _bad(metadata, "img_size", path)
    return WeightFacts(
        model=metadata.get("model", ""),
        model_args=_read(metadata, "model_args", dict, path) or {},
        img_size=size,
        classes=tuple(map(str, _read(metadata, "classes", list, path) or ())),
    )


def _read(metadata: Mapping[str, str], key: str, kind: type, path: str | os.PathLike) -> Any:
    try:
        value = json.loads(metadata.get(key, "null"))
    except ValueError as error:
        raise _bad(metadata, key, path) from error
    if value is not None and type(value) is not kind:
        raise _bad(metadata, key, path)
    return value


def _bad(metadata: Mapping[str, str], key: str, path: str | os.PathLike) -> ValueError:
    expected = {"img_size": "a number of pixels", "model_args": "a JSON mapping", "classes": "a JSON list"}[key]
    return ValueError(f"the checkpoint {str(path)!r} says {key} {metadata[key]!r}, expected {expected}")
