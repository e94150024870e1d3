"""Settings of quick trainings on synthetic slides, for the tests of training, prediction, reports and commands."""

from __future__ import annotations

from pathlib import Path

from ssmamba_models.engine.mil_config import MilConfig

# Small aggregators that learn the planted signal in seconds: name -> (arguments, epochs).
QUICK = {
    "mambamil": ({"dim": 16, "d_state": 4}, 4),
    "abmil": ({"hidden_dim": 16}, 12),
    "clam": ({"hidden_dim": 16}, 8),
    "dsmil": ({"hidden_dim": 16}, 8),
    "transmil": ({"hidden_dim": 16, "landmarks": 4, "heads": 2}, 6),
    "transformer_abmil": ({"hidden_dim": 16}, 6),
    "smabmil": ({"hidden_dim": 16}, 8),
    "patchgcn": ({"hidden_dim": 16}, 5),
    "mean": ({}, 20),
    "max": ({"hidden_dim": 16}, 10),
    "pama": ({"model": "test_pama", "model_args": {"anchor_drop_rate": 0.0}}, 20),
}


def quick_config(folder, aggregator: str = "abmil", **settings) -> MilConfig:
    """A training on the slides in `folder` that takes seconds."""
    arguments, epochs = QUICK[aggregator]
    defaults = {"aggregator_args": arguments, "epochs": epochs, "folds": 3, "lr": 5e-3, "device": "cpu"}
    files = {"features": str(folder), "labels": str(Path(folder) / "labels.csv")}
    return MilConfig(**{**files, "aggregator": aggregator, **defaults, **settings})
