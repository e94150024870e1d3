"""What an evaluation found, as plain data: report.json, from which report.md is written."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import timm
import torch

from ssmamba_models._version import __version__
from ssmamba_models.data.labelled import LabelledTiles
from ssmamba_models.evaluation.bootstrap import Estimate
from ssmamba_models.evaluation.folds import TRAIN_SHARE
from ssmamba_models.evaluation.model_choice import ModelChoice
from ssmamba_models.evaluation.scoring import EncoderScores, MethodScores, TaskData, compare_encoders
from ssmamba_models.evaluation.settings import Settings
from ssmamba_models.evaluation.tile_features import FeatureTable

FORMAT = 1
# A bootstrap of fewer groups sees too few different test sets.
_FEW_GROUPS = 10


@dataclass(frozen=True)
class Evaluated:
    """Everything that an evaluation found.

    Attributes:
        tiles: all tiles of the tasks.
        readable: the N that every encoder could read.
        models: the encoders.
        tables: label -> for each seed the table of features.
        features: label -> for each seed (N, D).
        tasks: the tasks over `readable`.
        scores: for each task, label -> scores.
        settings: how it was done.
        notes: what a reader should know.
    """

    tiles: LabelledTiles
    readable: LabelledTiles
    models: tuple[ModelChoice, ...]
    tables: dict[str, list[FeatureTable]]
    features: dict[str, list[np.ndarray]]
    tasks: list[TaskData]
    scores: list[dict[str, EncoderScores]]
    settings: Settings
    notes: list[str]


def make_report(evaluated: Evaluated) -> dict:
    """The report as dicts, lists, strings and numbers; nothing in it depends on the time."""
    return {
        "format": FORMAT,
        "versions": versions(),
        "settings": asdict(evaluated.settings),
        "data": _describe_data(evaluated),
        "models": [_describe_model(choice, evaluated.tables[choice.label]) for choice in evaluated.models],
        "tasks": [_describe_task(evaluated, task, scores) for task, scores in zip(evaluated.tasks, evaluated.scores)],
        "notes": [*_notes(evaluated), *evaluated.notes],
    }


def versions() -> dict[str, str]:
    """What the figures were computed with: package -> version."""
    import sklearn

    return {
        "ssmamba_models": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "scikit-learn": sklearn.__version__,
        "numpy": np.__version__,
    }


def _describe_data(evaluated: Evaluated) -> dict:
    tiles, readable = evaluated.tiles, evaluated.readable
    tables = [table for seeds in evaluated.tables.values() for table in seeds]
    unreadable = dict(entry for table in tables for entry in table.unreadable)
    return {
        "folder": str(tiles.root),
        "sha256": tiles.sha256(),
        "tiles": len(tiles),
        "readable": len(readable),
        "groups": len(set(readable.units)) if readable.groups is not None else None,
        "unreadable": [{"path": path, "reason": reason} for path, reason in sorted(unreadable.items())],
    }


def _describe_model(choice: ModelChoice, seeds: Sequence[FeatureTable]) -> dict:
    distinct = seeds if choice.varies else seeds[:1]
    return {
        "label": choice.label,
        "model": choice.name,
        "init": choice.init,
        "embed_dim": int(seeds[0].features.shape[1]),
        "weights_sha256": [table.provenance["weights_sha256"] for table in distinct],
        "provenance": [_jsonable(table.provenance) for table in distinct],
        "features_reused": all(table.reused for table in distinct),
    }


def _jsonable(attributes: dict) -> dict:
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in sorted(attributes.items())
    }


def _describe_task(evaluated: Evaluated, task: TaskData, scores: dict[str, EncoderScores]) -> dict:
    first = task.protocol.seeds[0]
    return {
        "name": task.task.name,
        "classes": list(task.task.classes),
        "protocol": {
            "kind": task.protocol.kind,
            "test_split": task.protocol.test_split,
            "folds": len(first),
            "seeds": len(task.protocol.seeds),
            "train_tiles": [[len(fold.train) for fold in folds] for folds in task.protocol.seeds],
            "test_tiles": len(task.protocol.test),
            "test_groups": task.resampling.count,
        },
        "results": {label: _describe_scores(entry) for label, entry in scores.items()},
        "comparisons": compare_encoders(scores),
    }


def _describe_scores(scores: EncoderScores) -> dict:
    described: dict = {name: _describe_method(entry) for name, entry in scores.methods.items()}
    described["few_shot"] = [
        {
            "shots": entry.shots,
            "metrics": _as_dicts(entry.estimates),
            "episodes_95": {name: list(spread) for name, spread in entry.spread.items()},
        }
        for entry in scores.shots
    ]
    if scores.magnification is not None:
        described["magnification"] = {name: _as_dicts(columns) for name, columns in scores.magnification.items()}
    return described


def _describe_method(scores: MethodScores) -> dict:
    return {
        "metrics": _as_dicts(scores.estimates),
        "classes": scores.table,
        "confusion": scores.confusion.tolist(),
        "notes": scores.notes,
    }


def _as_dicts(estimates: dict[str, Estimate]) -> dict[str, dict]:
    return {name: estimate.as_dict() for name, estimate in estimates.items()}


def _notes(evaluated: Evaluated) -> list[str]:
    notes = []
    if evaluated.tiles.groups is None:
        notes.append(
            "the tiles have no groups: tiles of one patient may be on both sides of a split, which flatters every "
            "figure, and the intervals take each tile for an independent witness, which makes them too narrow"
        )
    kinds = {task.protocol.kind for task in evaluated.tasks}
    if "split" in kinds and evaluated.settings.seeds > 1:
        notes.append(f"seeds differ in the training groups: {TRAIN_SHARE:.0%} of them, drawn class by class")
    if "folds" in kinds:
        notes.append("seeds differ in how groups are dealt to the folds")
    if evaluated.settings.seeds > 1:
        notes.append(
            "seeds differ in the few-shot episodes, and in the weights of encoders with random ones or several runs"
        )
    for task in evaluated.tasks:
        if task.resampling.count < _FEW_GROUPS:
            count = task.resampling.count
            notes.append(f"task {task.task.name} is scored on {count} groups, too few to trust its intervals")
    sizes = {label: seeds[0].provenance["input_size"][-1] for label, seeds in evaluated.tables.items()}
    if len(set(sizes.values())) > 1:
        seen = ", ".join(f"{label} {size} px" for label, size in sizes.items())
        notes.append(f"the encoders saw inputs of different sizes ({seen}); --img-size makes them equal")
    return notes


def write_json(path: Path, report: dict) -> None:
    """Write a report as JSON.

    Raises:
        ValueError: a figure is not finite.
    """
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
