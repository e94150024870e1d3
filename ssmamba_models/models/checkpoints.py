"""What timm must know to load weights of SSMamba: configurations, a filter of state dicts, and errors with a cure.

timm refuses unknown keys in a configuration (timm.models.PretrainedCfg).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import DefaultCfg, resolve_pretrained_cfg
from torch import nn

from ssmamba_models.models.published import check_cfg
from ssmamba_models.weights import ORGANIZATION, weight_source

FIRST_CONV = "stem.conv1"
HUB = f"https://huggingface.co/{ORGANIZATION}"
# Under which trainers put the state dict; the first that is there is taken.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def random_cfg(**entries: Any) -> dict[str, Any]:
    """The configuration of a model without weights; `entries` replace the defaults."""
    return {
        "url": "",
        "num_classes": 0,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": FIRST_CONV,
        "classifier": "head.fc",
        "license": "apache-2.0",
        "description": "SSMamba, an independent implementation of the published description; no pretrained weights.",
        "origin_url": HUB,
        "paper_ids": "arXiv:2604.15711",
        **entries,
    }


def mamim_cfg(name: str) -> dict[str, Any]:
    """The configuration of weights "<model>.mamim_lc25000": in this package, else on the Hub."""
    description = (
        "SSMamba, an independent implementation of the published description, pretrained without labels by MAMIM on "
        "the H&E tiles of lung and colon of LC25000; not the paper's weights."
    )
    return random_cfg(description=description, origin_url=f"{HUB}/{name}", **weight_source(name))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state dict of a checkpoint that a trainer has wrapped: unpacked, without prefixes.

    The stem's weights are float32, for timm sums them over the channels in the precision that it finds (in_chans=1).
    """
    for key in WRAPPERS:
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    state_dict = {name.removeprefix("module.").removeprefix("encoder."): value for name, value in state_dict.items()}
    stem = state_dict.get(f"{FIRST_CONV}.weight")
    if stem is not None and stem.dtype in (torch.bfloat16, torch.float16):
        state_dict[f"{FIRST_CONV}.weight"] = stem.float()
    return state_dict


def check_weights(variant: str, default_cfgs: Mapping[str, DefaultCfg], kwargs: Mapping[str, Any]) -> None:
    """Errors before the model is built, where timm's own name neither the weights that exist nor a cure.

    Args:
        variant: name of the model.
        default_cfgs: of its architecture.
        kwargs: what the model is built with.

    Raises:
        ValueError: there are no weights.
        WeightsError: published weights cannot be fetched, or are not those that were published.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if not (cfg.has_weights or cfg.state_dict):
        tagged = [f"{name}.{tag}" for name, default in default_cfgs.items() for tag in default.tags if tag]
        raise ValueError(f"{variant} has no trained weights; there are {', '.join(tagged)} (pretrained=False: random)")
    check_cfg(cfg.to_dict(), kwargs.get("cache_dir"))
