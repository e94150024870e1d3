"""The methods of self-supervised pretraining: a name, the module that gives the loss, the views that it wants."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ssmamba_models.engine.config import check_keys, complete_arguments
from ssmamba_models.ssl.mamim import MAMIM
from ssmamba_models.ssl.mamim_views import MamimViews
from ssmamba_models.ssl.sgcl import SGCL
from ssmamba_models.ssl.sgcl_views import SpatialGuidedMultiCrop


@dataclass(frozen=True)
class Method:
    """A method of pretraining.

    Attributes:
        module: (encoder, **method_args) -> module with `.encoder`; it maps a batch of views to a dict with "loss", and
            may have `reconstruct(batch)` -> dict of images (B, 3, S, S) in 0..1, and `start_step(epochs done, steps
            done)`, called before each step. One that takes `manifest` (the `SpatialTiles`) gets batches with `index`,
            and one that takes `seed` or `steps` the training's seed or number of steps.
        views: (img_size=..., mean=..., std=..., **view_args) -> (PIL image, torch.Generator) -> dict of tensors.
        defaults: settings of a training that the method wants other than `TrainConfig` has them.
    """

    module: Callable[..., nn.Module]
    views: Callable[..., Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spatial(self) -> bool:
        """Whether tiles must know where they lay."""
        return "manifest" in inspect.signature(self.module).parameters


METHODS = {
    "mamim": Method(MAMIM, MamimViews),
    # base_lr is of 256 tiles: 0.015 for a batch of 128. Unlike the recipe gradients are clipped, as everywhere here:
    # without that a small run on 200 tiles (one seed) collapsed, rank 2.8 against 10.4.
    "sgcl": Method(
        SGCL,
        SpatialGuidedMultiCrop,
        {"optimizer": "sgd", "base_lr": 0.03, "weight_decay": 1e-4, "batch_size": 128, "warmup_epochs": 0.0},
    ),
}

_BOUND = ("encoder", "manifest", "seed", "steps", "img_size", "mean", "std")


def get_method(name: str) -> Method:
    """Find a method, or say which there are (ValueError)."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known are: {', '.join(sorted(METHODS))}")
    return METHODS[name]


def complete_method_args(method: Method, given: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the method's module, with their defaults (ValueError: unknown name, wrong type)."""
    return complete_arguments("method_args", method.module, given, _BOUND)


def complete_view_args(method: Method, given: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the method's views that its module does not have as well (those two must agree)."""
    shared = inspect.signature(method.module).parameters
    own = [name for name in inspect.signature(method.views).parameters if name not in (*_BOUND, *shared)]
    check_keys(given, own, "in view_args")
    return complete_arguments("view_args", method.views, given, (*_BOUND, *shared))


def create_module(method: Method, method_args: dict[str, Any], **bound: Any) -> nn.Module:
    """The method's module; of `bound` (encoder, manifest, seed, steps) it gets what it takes."""
    return method.module(**method_args, **_taken(method.module, bound))


def create_views(method: Method, method_args: dict[str, Any], view_args: dict[str, Any], **bound: Any) -> Any:
    """The views; arguments that the module has too (a cell's size) are taken from `method_args`."""
    wanted = inspect.signature(method.views).parameters
    shared = {name: value for name, value in method_args.items() if name in wanted}
    return method.views(**shared, **view_args, **_taken(method.views, bound))


def _taken(function: Callable, values: dict[str, Any]) -> dict[str, Any]:
    wanted = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in wanted}
