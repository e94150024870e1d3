"""The folder that is published: weights as safetensors, timm's config.json with our domain block, a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg, is_model, save_for_hf
from torch import nn

from ssmamba_models._version import __version__
from ssmamba_models.engine.weight_facts import weight_facts
from ssmamba_models.engine.weights import classifier_width, find_weights, fit_weights, read_weights
from ssmamba_models.hub.card import CardFacts, make_card
from ssmamba_models.hub.card_page import CardInfo
from ssmamba_models.hub.run_record import read_run
from ssmamba_models.models.published import CONFIG, DOMAIN, WEIGHTS, file_sha256
from ssmamba_models.models.ssmamba import SSMamba
from ssmamba_models.notice import first_line
from ssmamba_models.output import set_usual_mode

CARD = "README.md"
FILES = (CONFIG, WEIGHTS, CARD)


@dataclass(frozen=True)
class Trained:
    """Trained weights in the model that they belong to.

    Attributes:
        network: with its classifier, where the weights have one.
        model: the timm name, without a tag.
        model_args: further arguments that made the network.
        path: the weights' file. metadata: what it says.
        img_size: side of the input, pixels. classes: names, or ().
    """

    network: nn.Module
    model: str
    model_args: Mapping[str, Any]
    path: Path
    metadata: Mapping[str, str]
    img_size: int
    classes: tuple[str, ...]


def load_trained(source: str | os.PathLike, model: str | None = None) -> Trained:
    """Load the weights of a run or file into the model that they belong to.

    Args:
        source: as `find_weights`.
        model: the timm name; None takes what the file says.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`; or `model` is unknown, or not given where it must be.
    """
    path = find_weights(source)
    state, metadata = read_weights(path)
    facts = weight_facts(metadata, path)
    name = _check_name(model or facts.model, path).split(".")[0]
    args = dict(facts.model_args)
    cfg = get_pretrained_cfg(name)
    if facts.img_size and cfg and cfg.fixed_input_size:
        args = {"img_size": facts.img_size, **args}
    network = timm.create_model(name, **{**args, "num_classes": 0})
    if count := classifier_width(network, state):
        network = timm.create_model(name, **{**args, "num_classes": count})
    fit_weights(network, state, metadata, path, classifier="keep")
    if facts.classes and len(facts.classes) != count:
        raise ValueError(
            f"the weights {str(path)!r} name {len(facts.classes)} classes, and their classifier has {count}"
        )
    size = facts.img_size or network.pretrained_cfg["input_size"][-1]
    return Trained(network.eval(), name, args, path, metadata, size, facts.classes)


def _check_name(name: str, path: Path) -> str:
    if not name or ":" in name:
        raise ValueError(f"the weights {str(path)!r} do not say of which model they are; give --model")
    if not is_model(name.split(".")[0]):
        raise ValueError(f"unknown model {name!r}; `ssmamba list` names ours, timm.list_models() all")
    return name


def write_bundle(folder: Path, trained: Trained, repo_id: str, info: CardInfo, dtype: str = "float32") -> str:
    """Write config.json, model.safetensors and README.md into an empty folder.

    Args:
        folder: exists.
        trained: what is published.
        repo_id: ORG/NAME, which the card names.
        info: for the card.
        dtype: of the stored weights, "float32" or "bfloat16".

    Returns:
        The SHA-256 of model.safetensors.

    Raises:
        OSError: it cannot be written.
    """
    network = trained.network.to(torch.bfloat16) if dtype == "bfloat16" else trained.network
    _tell_cfg(network, trained, info)
    labels = {"label_names": list(trained.classes)} if trained.classes else {}
    args = dict(trained.model_args) or None
    try:
        save_for_hf(network, str(folder), model_config=labels, model_args=args, safe_serialization=True)
        # Once more, with the metadata, which timm does not write.
        tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, {**trained.metadata, "format": "pt", "model": trained.model})
    except SafetensorError as error:
        raise OSError(f"cannot write {str(folder / WEIGHTS)!r} ({first_line(error)}); make room, try again") from error
    sha256 = file_sha256(folder / WEIGHTS)
    set_usual_mode(folder / WEIGHTS)
    _add_domain(folder / CONFIG, _domain(trained, info, sha256))
    (folder / CARD).write_text(make_card(_facts(trained, repo_id, dtype, sha256), info), encoding="utf-8")
    return sha256


_SOURCE_KEYS = ("tag", "url", "file", "hf_hub_id", "hf_hub_filename", "source")


def _tell_cfg(network: nn.Module, trained: Trained, info: CardInfo) -> None:
    # The architecture's own configuration speaks of other weights.
    cfg = network.pretrained_cfg
    for key in (*_SOURCE_KEYS, "description", "origin_url", "test_input_size", "label_names"):
        cfg.pop(key, None)
    channels = trained.model_args.get("in_chans", cfg["input_size"][0])
    cfg.update(
        num_classes=network.num_classes,
        input_size=(channels, trained.img_size, trained.img_size),
        pool_size=None,
        license=info.license,  # None: unknown
    )


def _feature_width(network: nn.Module) -> int:
    """Of the pooled features; that of the map may be another (global_pool="catavgmax")."""
    return getattr(network, "head_hidden_size", None) or network.num_features


def _domain(trained: Trained, info: CardInfo, sha256: str) -> dict[str, Any]:
    return {
        "target_mpp": info.target_mpp,
        "tile_size": trained.img_size,
        "embed_dim": _feature_width(trained.network),
        "training_data": info.training_data,
        "sha256": sha256,
        "ssmamba_models_version": __version__,
    }


def _add_domain(path: Path, domain: dict[str, Any]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, DOMAIN: domain}, indent=2) + "\n", encoding="utf-8")


def _facts(trained: Trained, repo_id: str, dtype: str, sha256: str) -> CardFacts:
    network = trained.network
    return CardFacts(
        repo_id=repo_id,
        model=trained.model,
        ours=isinstance(network, SSMamba),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        embed_dim=_feature_width(network),
        img_size=trained.img_size,
        num_classes=network.num_classes,
        classes=trained.classes,
        dtype=dtype,
        sha256=sha256,
        metadata=trained.metadata,
        run=read_run(trained.path),
    )
