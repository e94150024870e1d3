"""A model card's page: front matter, sections and tables that the cards of all models share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssmamba_models.engine.config import check_types
from ssmamba_models.hub.run_record import RunRecord

UNKNOWN = "unknown"
LIMITS = "For research. Not a medical device; nothing here has been validated for diagnosis."

Rows = Sequence[tuple[str, Any]]


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
class CardParts:
    """What differs between the cards of different kinds of models.

    Attributes:
        repo_id: ORG/NAME.
        library, pipeline, tags: front matter, by their names on the Hub.
        description: one paragraph, for want of the publisher's. origin: whose method it is; "" says nothing.
        use: Markdown, with the first lines of code.
        method: its name for a reader, or None.
        seen: what a training looks at, such as "images". data: further rows about it.
        model: rows about the model; None is written as unknown.
    """

    repo_id: str
    library: str
    pipeline: str
    tags: Sequence[str]
    description: str
    origin: str
    use: str
    method: str | None
    seen: str
    data: Rows
    model: Rows


def card_page(parts: CardParts, info: CardInfo, run: RunRecord, metadata: Mapping[str, Any]) -> str:
    """The README.md of a repository: YAML front matter and Markdown; `metadata` is that of the weights."""
    sections = [
        _front_matter(parts, info),
        f"# {parts.repo_id.split('/')[1]}",
        info.description or parts.description,
        *([parts.origin] if parts.origin else []),
        "## Use",
        parts.use,
        "## Training",
        _table(_training_rows(parts, info, run, metadata)),
        "## Model",
        _table([*parts.model, ("licence of the weights", info.license)]),
        "## Results",
        info.results or _last_epoch(run) or "None were stated.",
        "## Limits",
        f"{info.limits}\n\n{LIMITS}" if info.limits else LIMITS,
        *_hyper_parameters(run),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _front_matter(parts: CardParts, info: CardInfo) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=info.license or UNKNOWN,  # a name that the Hub knows
        library_name=parts.library,
        pipeline_tag=parts.pipeline,
        tags=list(parts.tags),
    )
    return f"---\n{data.to_yaml()}\n---"


def _training_rows(parts: CardParts, info: CardInfo, run: RunRecord, metadata: Mapping[str, Any]) -> Rows:
    return [
        ("training data", info.training_data),
        ("licence of the data", info.data_license),
        *parts.data,
        ("method", parts.method),
        ("epochs", metadata.get("epochs")),
        ("steps", metadata.get("step")),
        (f"{parts.seen} looked at, repetitions counted", None if run.images is None else f"{run.images:,}"),
        ("time", None if run.seconds is None else _duration(run.seconds)),
        ("hardware", info.hardware),
        ("ssmamba_models version", metadata.get("ssmamba_models_version")),
    ]


def weights_row(dtype: str, sha256: str) -> tuple[str, str]:
    """The row of a model's table that names its file."""
    return ("weights", f"`model.safetensors`, {dtype}, SHA-256 `{sha256}`")


def _table(rows: Rows) -> str:
    """Names and values as Markdown; None is unknown."""
    lines = [f"| {name} | {UNKNOWN if value is None else _cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours, in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _last_epoch(run: RunRecord) -> str:
    """What the log's last epoch says; "" where there is none."""
    if not run.last:
        return ""
    rows = [(name, f"{value:.4g}") for name, value in run.last.items()]
    return f"None were stated. The log's last epoch:\n\n{_table(rows)}"


def _hyper_parameters(run: RunRecord) -> list[str]:
    """The section of a card with the run's configuration; [] where there is none."""
    import yaml

    if not run.config:
        return []
    text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True).strip()
    return ["## Hyper-parameters", f"```yaml\n{text}\n```"]
