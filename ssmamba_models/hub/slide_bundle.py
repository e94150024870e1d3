"""The folder that is published of a slide encoder: weights as safetensors, config.json with our block, a model card."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ssmamba_models.hub.card_page import CardInfo
from ssmamba_models.hub.run_record import read_run
from ssmamba_models.hub.slide_card import SlideCardFacts, make_slide_card
from ssmamba_models.models.published import CONFIG, DOMAIN, WEIGHTS
from ssmamba_models.slide.slide_encoder import SlideEncoder
from ssmamba_models.slide.slide_weights import load_slide_encoder, read_slide_config, save_slide_encoder

CARD = "README.md"


def holds_slide_encoder(source: str | os.PathLike) -> bool:
    """Whether a folder is one of `ssmamba slide-pretrain`; a tile encoder's has no config.json, or another kind."""
    path = Path(source) / CONFIG
    if not path.is_file():
        return False
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("kind") == "slide_encoder"


def write_slide_bundle(
    folder: Path, source: str | os.PathLike, repo_id: str, info: CardInfo, dtype: str = "float32"
) -> tuple[str, str]:
    """Write config.json, model.safetensors and README.md into an empty folder.

    Args:
        folder: exists.
        source: a run folder of `ssmamba slide-pretrain`.
        repo_id: ORG/NAME, which the card names.
        info: for the card.
        dtype: of the stored weights, "float32" or "bfloat16"; they are loaded as float32.

    Returns:
        The SHA-256 of model.safetensors, and the call that loads it, with {name} for its place.

    Raises:
        ValueError, OSError: as `load_slide_encoder`.
    """
    encoder, metadata = load_slide_encoder(source), read_slide_config(source)["metadata"]
    if dtype == "bfloat16":
        encoder = encoder.to(torch.bfloat16)
    sha256 = save_slide_encoder(encoder, folder, metadata)
    _add_to_domain(folder / CONFIG, metadata, info)
    facts = SlideCardFacts(
        repo_id=repo_id,
        model=encoder.name,
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        feature_dim=encoder.feature_dim,
        embed_dim=encoder.embed_dim,
        dtype=dtype,
        sha256=sha256,
        metadata=metadata,
        run=read_run(Path(source) / WEIGHTS),
    )
    (folder / CARD).write_text(make_slide_card(facts, info), encoding="utf-8")
    return sha256, _call(encoder)


def _add_to_domain(path: Path, metadata: dict, info: CardInfo) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    tiles = metadata.get("provenance") or {}
    config[DOMAIN] |= {
        "target_mpp": info.target_mpp or tiles.get("target_mpp"),
        "tile_size": tiles.get("patch_size"),
        "training_data": info.training_data,
        "license": info.license,
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _call(encoder: SlideEncoder) -> str:
    return f'create_slide_encoder("{encoder.name}", {encoder.feature_dim}, pretrained="{{name}}")'
