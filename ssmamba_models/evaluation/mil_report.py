"""The report of a training of an aggregator: how well it tells slides of patients that it never saw."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ssmamba_models._version import __version__
from ssmamba_models.engine.config import config_values, load_config
from ssmamba_models.engine.mil import FOLD, PREDICTIONS, SLIDES
from ssmamba_models.engine.mil_config import MilConfig
from ssmamba_models.engine.mil_predictions import SlidePrediction, read_predictions
from ssmamba_models.evaluation.bootstrap import Resampling
from ssmamba_models.evaluation.class_metrics import (
    class_table,
    confusion_matrix,
    estimate_metrics,
    mean_of_known,
    one_vs_rest_auc,
)
from ssmamba_models.evaluation.mil_markdown import mil_markdown
from ssmamba_models.evaluation.plots import draw_confusion, draw_roc
from ssmamba_models.evaluation.report_folder import whole_report


def report_mil(run: str | os.PathLike, *, draws: int = 1000, plots: bool = True) -> dict[str, Any]:
    """Score the predictions of a run folder, and write report.json, report.md and plots/ into it.

    AUC (macro, one class against the rest), macro-F1, balanced accuracy and accuracy over all tested slides, with
    95 % intervals of a bootstrap over patients; AUC and accuracy of each fold.

    Args:
        run: a run folder that `train_mil` finished; an earlier report in it is replaced.
        draws: bootstrap draws.
        plots: draw the ROC curves and the confusion matrix.

    Returns:
        The content of report.json.

    Raises:
        FileNotFoundError: the run has no predictions.
        ValueError: draws is below 1.
        ImportError: an optional package is missing; the message names the extra.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}, expected 1 or more")
    folder = Path(run)
    predictions, classes = read_predictions(folder / PREDICTIONS)
    config = load_config(MilConfig, folder / "config.yaml")
    report = _make_report(folder, config, predictions, classes, draws)
    with whole_report(folder) as part:
        if plots:
            report["plots"] = _draw(part / "plots", config, predictions, classes)
        (part / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (part / "report.md").write_text(mil_markdown(report), encoding="utf-8")
    return report


def _make_report(
    run: Path, config: MilConfig, predictions: list[SlidePrediction], classes: tuple[str, ...], draws: int
) -> dict[str, Any]:
    actual, scores = _arrays(predictions, classes)
    labels, patients = [row.label for row in predictions], [row.patient for row in predictions]
    resampling = Resampling(patients, labels, draws=draws)
    estimates = estimate_metrics(actual, scores[None], resampling)
    table = class_table(actual, scores[None], classes, resampling.group_of) if _all_there(actual, classes) else []
    return {
        "aggregator": config.aggregator,
        "classes": list(classes),
        "data": json.loads((run / SLIDES).read_text(encoding="utf-8")),
        "tested": {
            "slides": len(predictions),
            "patients": len(set(patients)),
            "slides_per_class": dict(sorted(Counter(labels).items())),
        },
        "metrics": {name: _json_estimate(estimate.as_dict()) for name, estimate in estimates.items()},
        "folds": _folds(run, predictions, classes),
        "per_class": [_per_class(row) for row in table],
        "confusion_matrix": confusion_matrix(actual, scores).tolist(),
        "bootstrap_draws": draws,
        "settings": config_values(config),
        "ssmamba_models_version": __version__,
        "plots": [],
    }


def _arrays(predictions: list[SlidePrediction], classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    actual = np.array([classes.index(row.label) for row in predictions])
    return actual, np.array([row.probabilities for row in predictions])


def _all_there(actual: np.ndarray, classes: tuple[str, ...]) -> bool:
    return len(set(actual.tolist())) == len(classes)


def _json_estimate(estimate: dict[str, Any]) -> dict[str, Any]:
    """Without the seeds, of which there is one; JSON has no NaN."""
    return {key: _known(estimate[key]) for key in ("value", "low", "high")}


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _per_class(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `class_table`, whose tiles are slides here and whose groups patients."""
    names = {"tiles": "slides", "groups": "patients"}
    return {names.get(key, key): value for key, value in row.items()}


def _folds(run: Path, predictions: list[SlidePrediction], classes: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for number in sorted({row.fold for row in predictions}):
        record = json.loads((run / f"fold-{number}" / FOLD).read_text(encoding="utf-8"))
        actual, scores = _arrays([row for row in predictions if row.fold == number], classes)
        areas = one_vs_rest_auc(actual, scores, np.ones((1, len(actual))))
        rows.append(
            {
                "fold": number,
                "slides": {name: len(slides) for name, slides in record["slides"].items()},
                "best_epoch": record["best_epoch"],
                "epochs": len(record["history"]),
                "val_loss": record["val_loss"],
                "auc": _known(mean_of_known(areas)[0]),
                "accuracy": float((scores.argmax(axis=1) == actual).mean()),
            }
        )
    return rows


def _draw(
    folder: Path, config: MilConfig, predictions: list[SlidePrediction], classes: tuple[str, ...]
) -> list[dict[str, str]]:
    actual, scores = _arrays(predictions, classes)
    drawn = [{"file": "confusion.png", "kind": "confusion"}]
    draw_confusion(folder / "confusion.png", confusion_matrix(actual, scores), classes, config.aggregator)
    if _all_there(actual, classes):
        drawn.append({"file": "roc.png", "kind": "roc"})
        title = f"{config.aggregator}: slides of held-out patients"
        draw_roc(folder / "roc.png", actual, {config.aggregator: scores}, classes, title)
    return drawn
