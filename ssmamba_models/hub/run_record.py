"""What the folder of a run tells of how its weights came to be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssmamba_models.engine.config import read_yaml
from ssmamba_models.engine.weights import RUN_WEIGHTS
from ssmamba_models.models.published import WEIGHTS

# Of the machine that trained, and nothing that the weights depend on.
_LOCAL = frozenset({"device", "workers", "log_every", "cache_gb"})
_PATHS = ("data", "features", "init", "config", "out")
_LOCAL_DIR = "local-dir:"
# What logs of tile and of slide trainings count.
_COUNTED = ("images", "slides")
_BOOKKEEPING = frozenset({"step", "epoch", *_COUNTED, "seconds", "event", "lr", "grad_norm"})


@dataclass(frozen=True)
class RunRecord:
    """The record of a training; empty where the weights came without a run.

    Attributes:
        config: the hyper-parameters, with folders cut to their last part: where a person keeps data is theirs.
        seconds: of training. images: that it looked at (or slides), repetitions counted.
        last: what the log's last epoch says: metric -> value.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    images: int | None = None
    last: Mapping[str, float] = field(default_factory=dict)


def read_run(weights: Path) -> RunRecord:
    """Read config.yaml and log.jsonl beside a run's weights; what is not there stays unknown.

    Args:
        weights: the file that `find_weights` gave, or model.safetensors of a slide encoder's run.

    Raises:
        ValueError: config.yaml is not YAML, or has more values than a person could read.
        OSError: a file that is there cannot be read.
        ImportError: PyYAML is missing.
    """
    if weights.name not in (RUN_WEIGHTS, WEIGHTS):
        return RunRecord()
    lines = _read_log(weights.with_name("log.jsonl"))
    epochs = [line for line in lines if line.get("event") == "epoch"]
    return RunRecord(
        config=_read_config(weights.with_name("config.yaml")),
        seconds=_largest(lines, ("seconds",)),
        images=_largest(lines, _COUNTED),
        last=_numbers(epochs[-1]) if epochs else {},
    )


def _largest(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    return max((value for line in lines for name, value in _numeric(line).items() if name in names), default=None)


def _numeric(line: Mapping[str, Any]) -> dict[str, Any]:
    # Also of a log that a disk has damaged: what is no number says nothing.
    return {
        key: value
        for key, value in line.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values = read_yaml(path, "the run's")
    config = values if isinstance(values, dict) else {}
    return {key: _last_part(key, value) for key, value in config.items() if key not in _LOCAL}


def _last_part(key: str, value: Any) -> Any:
    if key == "model" and isinstance(value, str) and value.startswith(_LOCAL_DIR):
        return _LOCAL_DIR + Path(value.removeprefix(_LOCAL_DIR)).name
    return Path(value).name if key in _PATHS and isinstance(value, str) else value


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue  # a run that was killed may leave half a line
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in _numeric(line).items() if key not in _BOOKKEEPING}
