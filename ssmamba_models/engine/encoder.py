"""An encoder made ready for inference: model, weights, input transform, device, and where they come from."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg, is_model
from torch import nn

from ssmamba_models._version import __version__
from ssmamba_models.engine.device import encoder_dtype, resolve_device
from ssmamba_models.engine.feature_pool import PoolError, check_pool, pool_features
from ssmamba_models.engine.rng import seeded
from ssmamba_models.engine.weight_facts import WeightFacts, weight_facts
from ssmamba_models.engine.weights import (
    RUN_WEIGHTS,
    find_weights,
    fit_weights,
    read_weights,
    weights_sha256,
)
from ssmamba_models.inference import optimized_or_eager, plan_of
from ssmamba_models.models.published import WeightsError, check_named, offline_note
from ssmamba_models.notice import SSMambaWarning, first_line
from ssmamba_models.zoo import list_models


class RandomWeightsWarning(SSMambaWarning):
    """The model's weights are random: its features show the architecture, not what a training found."""


@dataclass(frozen=True)
class Encoder:
    """A model that turns images into features, in eval mode on its device.

    Attributes:
        model: maps (B, 3, H, W) float32 to (B, D), or to the map that is pooled to that.
        runner: the same for inference, made by `inference.optimize`: what computes features.
        name: the timm name, with its tag where one was given.
        embed_dim: D.
        transform: turns a PIL RGB image into the (3, H, W) tensor that the model expects.
        data_config: what the transform was made from (input_size, mean, std, interpolation, crop_pct,
            crop_mode).
        device: where the model is.
        dtype: what `runner` computes in, "float32", "bfloat16" or "int8".
        weights: the origin of the weights, as file attributes (pretrained_tag, checkpoint, seed).
        pool: how a map becomes a vector (see `engine.feature_pool`).
    """

    model: nn.Module
    runner: nn.Module
    name: str
    embed_dim: int
    transform: Callable
    data_config: Mapping[str, Any]
    device: torch.device
    dtype: str
    weights: Mapping[str, Any]
    pool: str = "model"

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Compute features.

        Args:
            images: (B, 3, H, W) float32, transformed, on any device.

        Returns:
            (B, D) float32, on the CPU.
        """
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return pool_features(self.runner, images, self.pool).float().cpu()

    def provenance(self) -> dict[str, Any]:
        """What a reader of the features must know to make them again: strings, numbers and lists of them."""
        return {
            "model": self.name,
            **self.weights,
            # Left out where it is what it always was: jobs of earlier versions go on.
            **({} if self.pool == "model" else {"pool": self.pool}),
            "weights_sha256": weights_sha256(self.model),
            **{key: self.data_config[key] for key in ("input_size", "mean", "std", "interpolation")},
            **{key: self.data_config[key] for key in ("crop_pct", "crop_mode")},
            "dtype": self.dtype,
            "device": self.device.type,
            "plan": plan_of(self.runner),
            "ssmamba_models_version": __version__,
            "torch_version": str(torch.__version__),
            "timm_version": timm.__version__,
        }


def load_encoder(
    model: str,
    *,
    pretrained: bool = False,
    checkpoint: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    img_size: int | None = None,
    seed: int = 0,
    pool: str = "model",
) -> Encoder:
    """Create a model of the zoo, or any model of timm, as a feature extractor.

    Args:
        model: a timm name, such as "ssmamba_small" or "vit_small_patch16_224.augreg_in1k"; or
            "hf-hub:ORG/NAME[@REVISION]" or "local-dir:FOLDER".
        pretrained: load the published weights of that name.
        checkpoint: load the weights of this file (.safetensors, .pth, .pt or .bin), or of the folder of a
            run of `ssmamba pretrain` or `ssmamba finetune`, instead.
        device: "cpu", "cuda", "cuda:1", ...; None takes a GPU where there is one.
        precision: "fp32", "bf16", "int8", or "auto": bf16 where a GPU computes in it. In bf16, features are good to
            about 2 digits. It is faster on a CPU with AVX512-BF16 or AMX; on others an ssmamba model takes as long as
            in fp32, any other model several times as long. int8 is for ssmamba models on a CPU that multiplies it
            (see `inference.optimize`).
        img_size: side of the square input in pixels; None takes the size that the checkpoint's run was
            trained at, where the file says one, else the model's own.
        seed: makes random weights the same in each run; unused where weights are loaded.
        pool: "model" takes what the model's head gives; "mean_std" the mean of its last map and how much that varies
            over the tile, twice as wide; "mean_std_last2" and "mean_std_last4" those of its last two and four maps (see
            `engine.feature_pool.pool_features`).

    Returns:
        The encoder.

    Raises:
        ValueError: unknown model, no published weights, a checkpoint that does not fit, an unusable device,
            precision or size.
        FileNotFoundError: the checkpoint does not exist.
        OSError: the published weights cannot be fetched, or are not those that were published.

    Warns:
        RandomWeightsWarning: neither `pretrained` nor `checkpoint` was given.
    """
    if pretrained and checkpoint is not None:
        raise ValueError("--pretrained and --checkpoint exclude each other: the weights come from one of them")
    check_model_name(model)
    check_pool(pool)
    place = resolve_device(device)
    source = None if checkpoint is None else find_weights(checkpoint)
    state, metadata = ({}, {}) if source is None else read_weights(source)
    facts = WeightFacts() if source is None else weight_facts(metadata, source)
    img_size = facts.img_size if img_size is None else img_size
    network = _create(model, pretrained, img_size, seed, facts.model_args)
    if source is not None:
        fit_weights(network, state, metadata, source)
    elif not pretrained:
        warnings.warn(
            f"features come from random weights of {model} (seed {seed}); use --pretrained (pretrained=True) "
            "or --checkpoint FILE (checkpoint=...) for trained ones",
            RandomWeightsWarning,
            stacklevel=2,
        )
    # Convolutions run up to a quarter faster on channels-last memory, and nothing measured runs slower.
    network = network.eval().requires_grad_(False).to(place, memory_format=torch.channels_last)
    data_config, transform = _input_transform(network, model, img_size)
    dtype = encoder_dtype(precision, place)
    runner = optimized_or_eager(network, dtype, model)
    return Encoder(
        model=network,
        runner=runner,
        name=model,
        embed_dim=measure_embed_dim(runner, model, data_config["input_size"], place, pool),
        transform=transform,
        data_config=data_config,
        device=place,
        dtype=dtype,
        weights=_describe_weights(network, pretrained, source, seed),
        pool=pool,
    )


def check_model_name(model: str) -> None:
    """Find a timm name, or say what is like it; names with a source ("hf-hub:...") pass, timm resolves them.

    Raises:
        ValueError: no model of that name, or no weights of its tag.
    """
    if ":" in model:
        return
    if is_model(model.split(".")[0]):
        _check_tag(model)
        return
    near = difflib.get_close_matches(model, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"unknown model {model!r}; {hint}`ssmamba list` names ours, timm.list_models() all")


def _check_tag(model: str) -> None:
    try:
        get_pretrained_cfg(model)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{model.split('.')[0]}.*")
        raise ValueError(f"unknown weights {model!r}; published are: {', '.join(tags) or 'none'}") from error


def _create(model: str, pretrained: bool, img_size: int | None, seed: int, args: Mapping[str, Any]) -> nn.Module:
    config = None if ":" in model else get_pretrained_cfg(model)
    if config is None:
        check_named(model, pretrained)
    elif pretrained and not config.has_weights:
        raise ValueError(
            f"{model} has no published weights; of this package, {', '.join(list_models(pretrained=True))} have; "
            "leave --pretrained out, or give --checkpoint FILE"
        )
    # A model with a position table must be told the size that it will see; the others take any.
    size = {"img_size": img_size} if img_size is not None and config and config.fixed_input_size else {}
    with seeded(seed):
        try:
            return timm.create_model(model, pretrained=pretrained, **{**args, **size, "num_classes": 0})
        except WeightsError:
            raise  # which names the repository and the cure
        # The hub's client, whichever it builds on, readers of weights and what a stranger's config.json asks for each
        # raise errors of their own.
        except Exception as error:
            if not pretrained and ":" not in model:
                raise
            raise OSError(
                f"the weights of {model} cannot be loaded ({first_line(error)}{offline_note()}); `ssmamba doctor` "
                "checks the hub's settings and cache; a file of weights that you have will do instead"
            ) from error


def _input_transform(network: nn.Module, name: str, img_size: int | None) -> tuple[dict[str, Any], Callable]:
    try:
        data_config = resolve_model_data_config(network, {"img_size": img_size})
        return data_config, create_transform(**data_config, is_training=False)
    except Exception as error:
        # A configuration that somebody else wrote may hold anything; timm's own are sound.
        if ":" not in name:
            raise
        raise ValueError(
            f"the configuration of {name} describes no input transform ({type(error).__name__}: {first_line(error)}); "
            "correct its pretrained_cfg, or take another revision"
        ) from error


def measure_embed_dim(
    network: nn.Module, name: str, input_size: tuple[int, ...], device: torch.device, pool: str = "model"
) -> int:
    """Embed one blank image: it tells the true width, and finds an impossible size before a long run does.

    Args:
        network: in eval mode, on `device`.
        name: what the messages call it.
        input_size: (channels, height, width).
        pool: as for `load_encoder`.

    Returns:
        The width of its features.

    Raises:
        ValueError: it cannot take images of that size, or does not return one vector per image.
    """
    try:
        with torch.inference_mode():
            features = pool_features(network, torch.zeros(1, *input_size, device=device), pool)
    except PoolError:
        raise  # another size would not help
    except (RuntimeError, AssertionError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{name} cannot take images of {input_size[1]} x {input_size[2]} px ({first_line(error)}); "
            "choose another --img-size"
        ) from error
    if features.ndim != 2:
        raise ValueError(f"{name} returns features of shape {tuple(features.shape)}, expected one vector per image")
    return features.shape[1]


def _describe_weights(network: nn.Module, pretrained: bool, source: Path | None, seed: int) -> dict[str, Any]:
    if pretrained:
        return {"weights": "pretrained", "pretrained_tag": network.pretrained_cfg.get("tag") or "default"}
    if source is not None:
        # Every run's file has the same name: its folder tells which run.
        name = source.name if source.name != RUN_WEIGHTS else f"{source.resolve().parent.name}/{source.name}"
        return {"weights": "checkpoint", "pretrained_tag": "none", "checkpoint": name}
    return {"weights": "random", "pretrained_tag": "none", "seed": seed}
