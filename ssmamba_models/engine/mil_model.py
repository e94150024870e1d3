"""Trained aggregators on the disk: safetensors that say what they are and which features they take."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ssmamba_models.engine.checkpoints import plain_state, save_weights
from ssmamba_models.notice import one_line
from ssmamba_models.slide.aggregators import create_aggregator

WEIGHTS = "weights.safetensors"
_FACTS = "ssmamba_mil"


@dataclass(frozen=True)
class MilModel:
    """A trained aggregator.

    Attributes:
        model: the module, in eval mode.
        aggregator: its name.
        classes: names of what its logits stand for.
        provenance: of the features that it was trained on, see `Bags.provenance`.
    """

    model: nn.Module
    aggregator: str
    classes: tuple[str, ...]
    provenance: dict[str, Any]


def save_mil_model(
    path: Path, model: nn.Module, aggregator: str, arguments: Mapping[str, Any], classes: tuple[str, ...],
    provenance: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write an aggregator as safetensors, whole or not at all.

    Args:
        path: the file.
        model: the module.
        aggregator, arguments: what `create_aggregator` made it from.
        classes, provenance: as `MilModel`.

    Raises:
        OSError: it cannot be written.
    """
    facts = {"aggregator": aggregator, "arguments": dict(arguments), "classes": classes, "provenance": provenance}
    # One entry: safetensors writes several in any order, and the same training should give the same bytes.
    save_weights(path, plain_state(model), {_FACTS: json.dumps(facts)})


def load_mil_model(path: str | os.PathLike, device: torch.device | str = "cpu") -> MilModel:
    """Read an aggregator back.

    Args:
        path: a run folder of `ssmamba mil train` (its best fold), or a weights file in it.
        device: where to put it.

    Returns:
        The aggregator, in eval mode.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no weights file of a trained aggregator.
        ImportError: its aggregator needs torchmil, which is missing.
    """
    file = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} does not exist; `ssmamba mil train` writes it when all folds are done")
    facts, state = _read(file)
    width, classes = facts["provenance"]["feature_dim"], tuple(facts["classes"])
    try:
        model = create_aggregator(facts["aggregator"], width, len(classes), **facts["arguments"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{str(file)!r} tells of no aggregator that can be made ({error}); train again") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = one_line(error)[:200]
        raise ValueError(f"the weights in {str(file)!r} do not fit {facts['aggregator']!r} ({reason})") from error
    return MilModel(model.to(device).eval(), facts["aggregator"], classes, facts["provenance"])


def _read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is damaged, or no safetensors file ({error}); train again") from error
    if _FACTS not in metadata:
        raise ValueError(f"{str(file)!r} holds no trained aggregator; give a run folder of `ssmamba mil train`")
    return _check_facts(metadata[_FACTS], file), state


# What `save_mil_model` writes, and what each is for Python.
_KINDS = {"aggregator": str, "arguments": dict, "classes": list, "provenance": dict}


def _check_facts(text: str, file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise ValueError(f"what {str(file)!r} tells of its aggregator is not JSON ({error}); train again") from error
    known = isinstance(facts, dict) and all(isinstance(facts.get(name), kind) for name, kind in _KINDS.items())
    if not known or not facts["classes"] or not all(isinstance(name, str) for name in facts["classes"]):
        raise ValueError(f"{str(file)!r} does not tell its aggregator, arguments, classes and features; train again")
    if type(facts["provenance"].get("feature_dim")) is not int:
        raise ValueError(f"{str(file)!r} does not tell the length of the features that it takes; train again")
    return facts
