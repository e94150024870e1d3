"""The models of this package, found and created by name: thin wrappers of timm."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from ssmamba_models import models as _models  # registers the models
from ssmamba_models.models.published import check_named

__all__ = ["create_model", "list_models"]

_PREFIX = _models.__name__ + "."


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names of this package's models, sorted; a thin wrapper of `timm.list_models`.

    Args:
        filter: shell pattern, such as "*small*"; "" for all.
        pretrained: only names with trained weights, each with its tag.
    """
    return [name for name in timm.list_models(filter, pretrained=pretrained) if _is_ours(name)]


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create one of this package's models; a thin wrapper of `timm.create_model`, which takes the same arguments.

    Also takes what `timm.create_model` takes instead of a name: "hf-hub:ORG/NAME[@REVISION]" and "local-dir:PATH".
    Weights that `ssmamba publish` wrote are compared with the SHA-256 that it wrote beside them.

    Args:
        model_name: of `list_models`, with or without a tag, or one of these sources.
        pretrained: whether to load trained weights; those of the package need no network.
        kwargs: as of `timm.create_model`, such as num_classes, in_chans, features_only.

    Returns:
        The model: images (B, in_chans, H, W) -> logits (B, num_classes), or features (B, D) if num_classes is 0.

    Raises:
        ValueError: this package has no model, or no weights, of that name.
        WeightsError: an OSError; the weights are not there, cannot be fetched, or are not those that were published.
    """
    if ":" in model_name:
        check_named(model_name, pretrained, kwargs.get("cache_dir"))
    else:
        if not _is_ours(model_name):
            raise ValueError(f"{model_name!r} is no model of ssmamba_models, which has {', '.join(list_models())}")
        _check_tag(model_name)
    return timm.create_model(model_name, pretrained=pretrained, **kwargs)


def _check_tag(model_name: str) -> None:
    name, dot, tag = model_name.partition(".")
    known = [full.partition(".")[2] for full in list_models(f"{name}.*", pretrained=True)]
    if dot and tag not in known:
        raise ValueError(f"{name} has no weights {tag!r}; it has {', '.join(known) or 'none yet'}")


def _is_ours(name: str) -> bool:
    name = name.split(".", 1)[0]
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith(_PREFIX)
