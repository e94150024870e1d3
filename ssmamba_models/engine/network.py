"""The network that a training starts from: architecture, size and first weights as the configuration says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import timm
from timm.models import get_pretrained_cfg, load_model_config_from_hf
from timm.models._hub import load_model_config_from_path
from torch import nn

from ssmamba_models.engine.encoder import check_model_name
from ssmamba_models.engine.rng import seeded
from ssmamba_models.engine.train_config import TrainConfig
from ssmamba_models.engine.weights import load_weights
from ssmamba_models.models.published import WeightsError, check_named, offline_note
from ssmamba_models.notice import first_line
from ssmamba_models.zoo import list_models

_SAVED_ARGS = "pretrained_model_args"


def create_network(config: TrainConfig, num_classes: int = 0) -> nn.Module:
    """Create the timm model that a config names.

    Args:
        config: model, model_args, drop_path_rate, img_size, init and seed are read.
        num_classes: of its classifier; 0: none. A new classifier is always random.

    Returns:
        The model, in training mode, on the CPU; its random weights depend on the seed alone.

    Raises:
        ValueError: an unknown model or argument, no published weights, or weights that do not fit.
        FileNotFoundError: `init` names no file.
        OSError: the published weights cannot be fetched.
    """
    check_model_name(config.model)
    published = get_pretrained_cfg(config.model) if ":" not in config.model else None
    if published is None:
        check_named(config.model, config.init == "pretrained")
    elif config.init == "pretrained" and not published.has_weights:
        raise ValueError(
            f"{config.model} has no published weights; of this package, {', '.join(list_models(pretrained=True))} "
            "have; use --init none, or --init FILE"
        )
    arguments = dict(config.model_args)
    if config.drop_path_rate is not None:
        arguments["drop_path_rate"] = config.drop_path_rate
    if published is not None and published.fixed_input_size:
        arguments["img_size"] = config.img_size
    with seeded(config.seed):
        network = _create(config, num_classes, arguments)
        if config.init == "pretrained" and num_classes and _published_classes(network) == num_classes:
            # As many classes are not the same classes.
            cast(Callable[[int], None], network.reset_classifier)(num_classes)
    _keep_saved_args(config.model, network)
    if config.init not in ("none", "pretrained"):
        _check_source(config.init)
        load_weights(network, config.init)
    return network


def _create(config: TrainConfig, num_classes: int, arguments: dict) -> nn.Module:
    pretrained = config.init == "pretrained"
    try:
        return timm.create_model(config.model, pretrained=pretrained, num_classes=num_classes, **arguments)
    except TypeError as error:
        raise ValueError(
            f"{config.model} does not take these arguments: {', '.join(arguments)} ({first_line(error)}); "
            "change model_args"
        ) from error
    except WeightsError:
        raise  # which names the repository and the cure
    # The hub's client, whichever it builds on, and readers of weights each raise errors of their own.
    except Exception as error:
        if not pretrained:
            raise
        raise OSError(
            f"the weights of {config.model} cannot be loaded ({first_line(error)}{offline_note()}); `ssmamba doctor` "
            "checks the hub's settings and cache, --init FILE takes weights that you have"
        ) from error


def _published_classes(network: nn.Module) -> int:
    return _cfg(network).get("num_classes", 0)


def _cfg(network: nn.Module) -> Mapping[str, Any]:
    # nn.Module says that its attributes are tensors or modules.
    return cast(Mapping[str, Any], getattr(network, "pretrained_cfg", None) or {})


def told_name(model: str, network: nn.Module) -> str:
    """What weights say that they are of.

    Args:
        model: as it was asked for; a place ("hf-hub:...", "local-dir:...") is a matter of this machine and day.
        network: what timm made of it.

    Returns:
        A timm name.
    """
    return model if ":" not in model else _cfg(network)["architecture"]


def told_args(network: nn.Module, arguments: Mapping[str, Any]) -> dict[str, str]:
    """What weights say of the arguments that made their network, beside its name.

    Args:
        network: of `create_network`.
        arguments: that were given; a place adds those of its own config.json.

    Returns:
        "model_args" -> JSON, or nothing where there are none.
    """
    known = {**(getattr(network, _SAVED_ARGS, None) or {}), **arguments}
    return {"model_args": json.dumps(known)} if known else {}


def _keep_saved_args(model: str, network: nn.Module) -> None:
    """Remember the arguments of a place's config.json, which older timms do not."""
    source, _, place = model.partition(":")
    if place and not hasattr(network, _SAVED_ARGS):
        load = load_model_config_from_path if source.startswith("local") else load_model_config_from_hf
        setattr(network, _SAVED_ARGS, load(place)[2])


def _check_source(init: str) -> None:
    if not init or not Path(init).exists():
        raise FileNotFoundError(
            f'init is {init!r}, expected "none", "pretrained", or a weight file or run folder that exists'
        )
