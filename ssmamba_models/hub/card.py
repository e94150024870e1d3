"""Model cards: what is known of trained weights, for those who use them; the rest is said to be unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssmamba_models.engine.config import check_types
from ssmamba_models.hub.run_record import RunRecord

UNKNOWN = "unknown"
OURS = (
    "An independent implementation of the published description of SSMamba (arXiv:2604.15711): neither code nor "
    "weights of the paper are public, and these weights are not the paper's."
)
LIMITS = "For research. Not a medical device; nothing here has been validated for diagnosis."


@dataclass(frozen=True, kw_only=True)
class CardInfo:
    """What only the publisher knows; None is written as unknown.

    Attributes:
        license: of the weights, by its name on the Hub.
        description: one paragraph.
        training_data: name, origin and part of the data.
        data_license: of the data.
        target_mpp: magnification to use the model at, in microns per pixel of its input.
        hardware: that it was trained on.
        results: Markdown: figures, with what they were measured on.
        limits: Markdown: what it cannot do.
    """

    license: str | None = None
    description: str | None = None
    training_data: str | None = None
    data_license: str | None = None
    target_mpp: float | None = None
    hardware: str | None = None
    results: str | None = None
    limits: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.target_mpp is not None and not 0 < self.target_mpp < 1000:
            raise ValueError(f"target_mpp is {self.target_mpp}, expected microns per pixel, such as 0.5")


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
    sections = [
        _front_matter(facts, info),
        f"# {facts.repo_id.split('/')[1]}",
        info.description or _describe(facts),
        *([OURS] if facts.ours else []),
        "## Use",
        _use(facts),
        "## Training",
        card_table(_training_rows(facts, info)),
        "## Model",
        card_table(_model_rows(facts, info)),
        "## Results",
        info.results or last_epoch(facts.run) or "None were stated.",
        "## Limits",
        f"{info.limits}\n\n{LIMITS}" if info.limits else LIMITS,
        *hyper_parameters(facts.run),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _front_matter(facts: CardFacts, info: CardInfo) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=info.license or UNKNOWN,  # a name that the Hub knows
        library_name="timm",
        pipeline_tag="image-classification" if facts.num_classes else "image-feature-extraction",
        tags=["timm", "ssmamba-models", *(["state-space-model"] if facts.ours else []), "pathology", "histology"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _describe(facts: CardFacts) -> str:
    kind = f"A classifier of {facts.num_classes} classes" if facts.num_classes else "An encoder of image tiles"
    method = facts.metadata.get("method")
    trained = f", trained by {'MAMIM' if method == 'mamim' else method}" if method else ""
    return f"{kind} for computational pathology: `{facts.model}`{trained}."


def _use(facts: CardFacts) -> str:
    shape = f"(1, {facts.num_classes}), one logit per class" if facts.num_classes else f"(1, {facts.embed_dim})"
    return f"""```python
import ssmamba_models  # registers the models with timm
import timm
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("hf-hub:{facts.repo_id}", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model), is_training=False)
output = model(transform(Image.open("tile.png").convert("RGB"))[None])  # {shape}
```

A folder of tiles to one file of features:

```sh
ssmamba embed TILES --out features.h5 --model hf-hub:{facts.repo_id} --pretrained
```"""


def _training_rows(facts: CardFacts, info: CardInfo) -> list[tuple[str, Any]]:
    method = facts.metadata.get("method")
    return [
        ("training data", info.training_data),
        ("licence of the data", info.data_license),
        ("SHA-256 of the data's list of files", facts.metadata.get("data")),
        ("method", {"mamim": "MAMIM (masked image modelling, no labels)"}.get(method, method)),
        ("epochs", facts.metadata.get("epochs")),
        ("steps", facts.metadata.get("step")),
        ("images looked at, repetitions counted", None if facts.run.images is None else f"{facts.run.images:,}"),
        ("time", None if facts.run.seconds is None else duration(facts.run.seconds)),
        ("hardware", info.hardware),
        ("ssmamba_models version", facts.metadata.get("ssmamba_models_version")),
    ]


def _model_rows(facts: CardFacts, info: CardInfo) -> list[tuple[str, Any]]:
    names = f": {', '.join(facts.classes)}" if facts.classes else ""
    return [
        ("architecture", f"`{facts.model}`, {facts.parameters / 1e6:.2f} M parameters"),
        ("features", facts.embed_dim),
        ("classes", f"{facts.num_classes}{names}" if facts.num_classes else "none: an encoder alone"),
        ("input", f"RGB, {facts.img_size} x {facts.img_size} px"),
        ("magnification", None if info.target_mpp is None else f"{info.target_mpp:g} microns per pixel"),
        ("weights", f"`model.safetensors`, {facts.dtype}, SHA-256 `{facts.sha256}`"),
        ("licence of the weights", info.license),
    ]


def card_table(rows: Sequence[tuple[str, Any]]) -> str:
    """Names and values as Markdown; None is unknown."""
    lines = [f"| {name} | {UNKNOWN if value is None else _cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def last_epoch(run: RunRecord) -> str:
    """What the log's last epoch says; "" where there is none."""
    if not run.last:
        return ""
    rows = [(name, f"{value:.4g}") for name, value in run.last.items()]
    return f"None were stated. The log's last epoch:\n\n{card_table(rows)}"


def hyper_parameters(run: RunRecord) -> list[str]:
    """The section of a card with the run's configuration; [] where there is none."""
    import yaml

    if not run.config:
        return []
    text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True).strip()
    return ["## Hyper-parameters", f"```yaml\n{text}\n```"]
