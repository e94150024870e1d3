"""The methods of slide-level self-supervision: a name, the module that gives the loss, the views that it wants."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ssmamba_models.data.seeded import SeededBatch, collate_seeded
from ssmamba_models.slide.gigassl_ssl import GigaSSL
from ssmamba_models.slide.gigassl_views import GigaSSLViews
from ssmamba_models.slide.pama_ssl import PamaPretraining
from ssmamba_models.slide.pama_views import PamaViews


@dataclass(frozen=True)
class SlideMethod:
    """A method of slide-level pretraining.

    Attributes:
        module: (SlideEncoder, **method_args) -> module with `.encoder`; it maps a batch to a dict with "loss".
        views: (**view_args), and by choice `encoder`, -> (SlideTiles, torch.Generator) -> dict of tensors; it may have
            `collate(list of dicts)` -> dict of tensors, for slides of different lengths.
        least_slides: fewest slides that the loss can be computed of, over all processes.
        defaults: settings of `SlidePretrainConfig` that the method's recipe has; `model` among them.
    """

    module: Callable[..., nn.Module]
    views: Callable[..., Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    least_slides: int = 1


SLIDE_METHODS = {
    # Source of the defaults: arXiv:2212.03273 (Adam, no decay) and arXiv:2407.07504 (AdamW).
    "gigassl": SlideMethod(GigaSSL, GigaSSLViews, {"model": "gigassl_scm", "weight_decay": 0.0}, least_slides=2),
    "pama": SlideMethod(PamaPretraining, PamaViews.of, {"model": "pama_base", "weight_decay": 0.05}),
}


def get_slide_method(name: str) -> SlideMethod:
    """Find a method, or say which there are (ValueError)."""
    if name not in SLIDE_METHODS:
        raise ValueError(f"unknown method {name!r}; known are: {', '.join(sorted(SLIDE_METHODS))}")
    return SLIDE_METHODS[name]


def slide_collate(views: Any) -> Callable[..., SeededBatch]:
    """The `collate_fn` for views: their own `collate`, where slides must be padded."""
    own = getattr(views, "collate", None)
    return collate_seeded if own is None else functools.partial(collate_seeded, stack=own)
