"""All aggregators by name: `create_aggregator`, `list_aggregators`."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from ssmamba_models.choices import AGGREGATORS
from ssmamba_models.slide.aggregator import Aggregator
from ssmamba_models.slide.class_arguments import check_arguments


def list_aggregators() -> list[str]:
    """The names that `create_aggregator` knows."""
    return list(AGGREGATORS)


def aggregator_class(name: str) -> type[Aggregator]:
    """The class behind a name.

    Raises:
        ValueError: an unknown name; the nearest ones are named.
    """
    if name not in AGGREGATORS:
        near = difflib.get_close_matches(str(name).lower(), AGGREGATORS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(AGGREGATORS)}"
        raise ValueError(f"unknown aggregator {name!r}; {hint}")
    module, attribute = AGGREGATORS[name]
    return getattr(importlib.import_module(f"ssmamba_models.slide.{module}"), attribute)


def create_aggregator(name: str, feature_dim: int, num_classes: int, **kwargs: Any) -> Aggregator:
    """Make an aggregator: a module that maps the tile features of slides to logits and a weight for each tile.

    Args:
        name: one of `list_aggregators()`.
        feature_dim: D, the length of a tile's feature.
        num_classes: number of classes, 2 or more.
        **kwargs: further arguments of its class, such as hidden_dim or dropout.

    Returns:
        The module; see `ssmamba_models.slide.aggregator.Aggregator` for its inputs and outputs.

    Raises:
        ValueError: an unknown name or argument, or a value that cannot be.
        ImportError: it is one of torchmil's, and torchmil is missing.

    Example:
        >>> model = create_aggregator("mambamil", feature_dim=512, num_classes=2)
        >>> model(features, coords)["logits"]  # features (B, N, 512), coords (B, N, 2) -> (B, 2)
    """
    cls = aggregator_class(name)
    check_arguments(f"aggregator {name!r}", cls, kwargs, ("feature_dim", "num_classes"))
    return cls(feature_dim, num_classes, **kwargs)
