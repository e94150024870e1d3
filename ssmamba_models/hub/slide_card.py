"""The model card of a slide encoder: what it takes, how it was trained, how to use it; the rest is unknown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ssmamba_models.hub.card_page import CardInfo, CardParts, Rows, card_page, weights_row
from ssmamba_models.hub.run_record import RunRecord

_METHODS = {
    "gigassl": "Giga-SSL (contrastive learning of slides, arXiv:2212.03273, no labels)",
    "pama": "PAMA (position-aware masked autoencoder, arXiv:2407.07504, no labels)",
}
_OURS = "An independent implementation of a published method: these weights are not those of the paper."


@dataclass(frozen=True, kw_only=True)
class SlideCardFacts:
    """What a slide encoder and its run say themselves.

    Attributes:
        repo_id: ORG/NAME. model: its name in the registry.
        parameters: how many. feature_dim: width of the tile features it takes. embed_dim: length of a slide's vector.
        dtype, sha256: of the weights' file.
        metadata: of config.json. run: of the run.
    """

    repo_id: str
    model: str
    parameters: int
    feature_dim: int
    embed_dim: int
    dtype: str
    sha256: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    run: RunRecord = field(default_factory=RunRecord)


def make_slide_card(facts: SlideCardFacts, info: CardInfo) -> str:
    """The README.md of a repository: YAML front matter and Markdown."""
    method = facts.metadata.get("method")
    parts = CardParts(
        repo_id=facts.repo_id,
        library="ssmamba-models",
        pipeline="feature-extraction",
        tags=["ssmamba-models", "pathology", "histology", "whole-slide-image"],
        description=_describe(facts),
        origin=_OURS if method in _METHODS else "",
        use=_use(facts),
        method=None if method is None else _METHODS.get(method, method),
        seen="slides",
        data=[
            ("slides", facts.metadata.get("slides")),
            ("slides with shared augmentation", facts.metadata.get("slides_with_shared_augmentation")),
            ("SHA-256 of the data's list of slides", facts.metadata.get("data")),
        ],
        model=_model_rows(facts, info),
    )
    return card_page(parts, info, facts.run, facts.metadata)


def _describe(facts: SlideCardFacts) -> str:
    method = facts.metadata.get("method")
    trained = f", trained by {_METHODS.get(method, method)}" if method else ""
    return f"A slide encoder for computational pathology: tile features in, one vector out. `{facts.model}`{trained}."


def _use(facts: SlideCardFacts) -> str:
    place = f"hf-hub:{facts.repo_id}"
    return f"""```python
from ssmamba_models.slide import create_slide_encoder

encoder = create_slide_encoder("{facts.model}", feature_dim={facts.feature_dim}, pretrained="{place}")
vector = encoder.embed(features, grid)  # (N, {facts.feature_dim}), (N, 2) in tiles -> ({facts.embed_dim},)
```

Feature files of slides (`ssmamba extract`) to one file of slide vectors:

```sh
ssmamba slide-embed --run {place} --features FOLDER --out slides.h5
```"""


def _model_rows(facts: SlideCardFacts, info: CardInfo) -> Rows:
    tiles = facts.metadata.get("provenance") or {}
    mpp = info.target_mpp or tiles.get("target_mpp")
    return [
        ("architecture", f"`{facts.model}`, {facts.parameters / 1e6:.2f} M parameters"),
        ("vector of a slide", facts.embed_dim),
        ("features of a tile", facts.feature_dim),
        ("tile encoder", f"`{tiles['model']}`" if tiles.get("model") else None),
        ("SHA-256 of the tile encoder's weights", tiles.get("weights_sha256")),
        ("tiles", f"{tiles['patch_size']} px" if tiles.get("patch_size") else None),
        ("magnification", None if mpp is None else f"{mpp:g} microns per pixel"),
        weights_row(facts.dtype, facts.sha256),
    ]
