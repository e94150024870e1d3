"""The model card of a tile encoder or a classifier: what it takes, how it was trained, how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from timm.models import get_pretrained_cfg, is_model_pretrained

from ssmamba_models.hub.card_page import CardInfo, CardParts, Rows, card_page, weights_row
from ssmamba_models.hub.run_record import RunRecord

OURS = (
    "An independent implementation of the published description of SSMamba (arXiv:2604.15711): neither code nor "
    "weights of the paper are public, and these weights are not the paper's."
)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the weights and their run say themselves.

    Attributes:
        repo_id: ORG/NAME. model: the timm name. ours: whether that is a model of this package.
        parameters: how many. embed_dim: width of a feature. img_size: side of the input, pixels.
        classes: names, or () for an encoder alone. num_classes: how many, 0 for an encoder alone.
        dtype, sha256: of the weights' file.
        metadata: of the weights' file. run: of the run.
    """

    repo_id: str
    model: str
    ours: bool
    parameters: int
    embed_dim: int
    img_size: int
    num_classes: int
    classes: Sequence[str]
    dtype: str
    sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    run: RunRecord = field(default_factory=RunRecord)


def make_card(facts: CardFacts, info: CardInfo) -> str:
    """The README.md of a repository: YAML front matter and Markdown."""
    method = facts.metadata.get("method")
    parts = CardParts(
        repo_id=facts.repo_id,
        library="timm",
        pipeline="image-classification" if facts.num_classes else "image-feature-extraction",
        tags=["timm", "ssmamba-models", *(["state-space-model"] if facts.ours else []), "pathology", "histology"],
        description=_describe(facts),
        origin=OURS if facts.ours else "",
        use=_use(facts),
        method="MAMIM (masked image modelling, no labels)" if method == "mamim" else method,
        seen="images",
        data=[("SHA-256 of the data's list of files", facts.metadata.get("data"))],
        model=_model_rows(facts, info),
    )
    return card_page(parts, info, facts.run, facts.metadata)


def _describe(facts: CardFacts) -> str:
    kind = f"A classifier of {facts.num_classes} classes" if facts.num_classes else "An encoder of image tiles"
    method = facts.metadata.get("method")
    trained = f", trained by {'MAMIM' if method == 'mamim' else method}" if method else ""
    return f"{kind} for computational pathology: `{facts.model}`{trained}."


def _use(facts: CardFacts) -> str:
    source = _source(facts.repo_id)
    shape = f"(1, {facts.num_classes}), one logit per class" if facts.num_classes else f"(1, {facts.embed_dim})"
    return f"""```python
import ssmamba_models  # registers the models with timm
import timm
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("{source}", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model), is_training=False)
output = model(transform(Image.open("tile.png").convert("RGB"))[None])  # {shape}
```

A folder of tiles to one file of features:

```sh
ssmamba embed TILES --out features.h5 --model {source} --pretrained
```"""


def _source(repo_id: str) -> str:
    """What timm.create_model takes: our own repositories go by a name that needs no network."""
    name = repo_id.split("/")[1]
    cfg = get_pretrained_cfg(name) if is_model_pretrained(name) else None
    return name if cfg and cfg.hf_hub_id == repo_id else f"hf-hub:{repo_id}"


def _model_rows(facts: CardFacts, info: CardInfo) -> Rows:
    names = f": {', '.join(facts.classes)}" if facts.classes else ""
    return [
        ("architecture", f"`{facts.model}`, {facts.parameters / 1e6:.2f} M parameters"),
        ("features", facts.embed_dim),
        ("classes", f"{facts.num_classes}{names}" if facts.num_classes else "none: an encoder alone"),
        ("input", f"RGB, {facts.img_size} x {facts.img_size} px"),
        ("magnification", None if info.target_mpp is None else f"{info.target_mpp:g} microns per pixel"),
        weights_row(facts.dtype, facts.sha256),
    ]
