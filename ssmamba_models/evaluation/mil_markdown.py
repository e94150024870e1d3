"""report.md of a training of an aggregator, made from report.json's content alone."""

from __future__ import annotations

from typing import Any

from ssmamba_models.evaluation.markdown_table import markdown_table
from ssmamba_models.evaluation.report_folder import PLOTS

_METRICS = {"auc": "AUC", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy"}


def mil_markdown(report: dict[str, Any]) -> str:
    """Write a report for a person.

    Args:
        report: what `report_mil` gives.

    Returns:
        Markdown; every figure in it is a figure of the report, rounded.
    """
    parts = [
        f"# Slides told apart by {report['aggregator']}",
        _opening(report),
        markdown_table(("metric", "value", "95 % interval"), [_metric(name, report) for name in _METRICS]),
        "## Folds",
        markdown_table(("fold", "train", "val", "test", "best epoch", "AUC", "accuracy"), map(_fold, report["folds"])),
        *_classes(report),
        *(f"![{plot['kind']}]({PLOTS}/{plot['file']})" for plot in report["plots"]),
        "## How to read this",
        _how_to_read(report),
    ]
    return "\n\n".join(parts) + "\n"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _opening(report: dict[str, Any]) -> str:
    tested, data = report["tested"], report["data"]
    counts = ", ".join(f"{count} {name}" for name, count in tested["slides_per_class"].items())
    features = data["provenance"]
    source = f"`{features['model']}`" if features["model"] else "a model that the files do not name"
    lines = [
        f"{tested['slides']} slides of {tested['patients']} patients ({counts}), each scored by a model that saw no "
        f"slide of its patient. Features: {features['feature_dim']} numbers per tile by {source}, tiles of "
        f"{features['patch_size']} px at {features['target_mpp']:g} um/px."
    ]
    for key, text in (("unlabelled", "have features and no label"), ("missing", "have a label and no features")):
        if data[key]:
            names = ", ".join(f"`{name}`" for name in data[key][:10]) + (", ..." if len(data[key]) > 10 else "")
            lines.append(f"Left out, since they {text}: {len(data[key])} slides ({names}).")
    return "\n\n".join(lines)


def _metric(name: str, report: dict[str, Any]) -> tuple[str, str, str]:
    estimate = report["metrics"][name]
    return _METRICS[name], _figure(estimate["value"]), f"{_figure(estimate['low'])} to {_figure(estimate['high'])}"


def _fold(row: dict[str, Any]) -> tuple[Any, ...]:
    slides = row["slides"]
    counts = (slides["train"], slides["val"], slides["test"])
    figures = (_figure(row["auc"]), _figure(row["accuracy"]))
    return row["fold"], *counts, f"{row['best_epoch']} of {row['epochs']}", *figures


def _classes(report: dict[str, Any]) -> list[str]:
    if not report["per_class"]:
        return []
    columns = ("slides", "patients", "precision", "recall", "f1", "auc")
    rows = [
        (row["class"], *(_figure(row[name]) if isinstance(row[name], float) else row[name] for name in columns))
        for row in report["per_class"]
    ]
    return ["## Classes", markdown_table(("class", *columns), rows)]


def _how_to_read(report: dict[str, Any]) -> str:
    return (
        f"Intervals come from {report['bootstrap_draws']} bootstrap draws of patients, class by class; they tell how "
        "much the figures would move with other patients, not with another training. AUC is the mean over classes of "
        "one against the rest, over all slides at once: the folds' models need not agree in scale, so the folds' own "
        "AUC may be higher. Epochs were chosen on slides of other patients than those tested."
    )
