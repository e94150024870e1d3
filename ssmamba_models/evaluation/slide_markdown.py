"""report.md of an evaluation of slide vectors, made from report.json's content alone."""

from __future__ import annotations

from typing import Any

from ssmamba_models.evaluation.markdown_table import markdown_table
from ssmamba_models.evaluation.report_folder import PLOTS

_METHODS = {"logistic_regression": "logistic regression", "knn": "kNN"}
_METRICS = {"auc": "AUC", "macro_f1": "macro-F1"}


def slide_markdown(report: dict[str, Any]) -> str:
    """Write a report for a person.

    Args:
        report: what `evaluate_slides` gives.

    Returns:
        Markdown; every figure in it is a figure of the report, rounded.
    """
    parts = ["# Evaluation of slide vectors", _opening(report), _vectors(report)]
    for method in _METHODS:
        for metric in _METRICS:
            parts += [f"## {_METRICS[metric]}, {_METHODS[method]}", _scores(report, method, metric)]
    parts += [
        *_comparisons(report),
        *(f"![{plot['kind']}]({PLOTS}/{plot['file']})" for plot in report["plots"]),
        "## How to read this",
        _how_to_read(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(report: dict[str, Any]) -> str:
    data, protocol = report["data"], report["protocol"]
    counts = ", ".join(f"{count} {name}" for name, count in data["slides_per_class"].items())
    patients = "" if data["patients"] is None else f" of {data['patients']} patients"
    how = f"learned from the split train, scored on the split {protocol['test_split']}"
    if protocol["kind"] == "folds":
        how = f"{protocol['folds']} folds that divide no patient, drawn {report['settings']['repeats']} times"
    lines = [f"{data['slides']} slides{patients} ({counts}); {protocol['scored_slides']} scored: {how}."]
    for key, text in (("unlabelled", "have a vector and no label"), ("missing", "have a label and no vector")):
        if data[key]:
            names = ", ".join(f"`{name}`" for name in data[key][:10]) + (", ..." if len(data[key]) > 10 else "")
            lines.append(f"Left out, since they {text}: {len(data[key])} slides ({names}).")
    return "\n\n".join(lines)


def _vectors(report: dict[str, Any]) -> str:
    rows = [
        (
            entry["label"],
            "baseline" if entry["baseline"] else f"`{entry['attributes'].get('model', 'unknown')}`",
            entry["embed_dim"],
            f"`{entry['file']}`",
        )
        for entry in report["vectors"]
    ]
    return markdown_table(("vectors", "model", "length", "file"), rows)


def _scores(report: dict[str, Any], method: str, metric: str) -> str:
    first = next(iter(report["results"].values()))
    budgets = [entry for entry in first if entry["method"] == method]
    header = ("vectors", *(_budget(entry) for entry in budgets))
    rows = [
        (label, *(_estimate(entry["metrics"][metric]) for entry in entries if entry["method"] == method))
        for label, entries in report["results"].items()
    ]
    return markdown_table(header, rows)


def _budget(entry: dict[str, Any]) -> str:
    least, most = entry["train_slides"]
    count = f"{least}" if least == most else f"{least} to {most}"
    return f"{count} slides" if entry["budget"] == count else f"{entry['budget']} ({count})"


def _estimate(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _comparisons(report: dict[str, Any]) -> list[str]:
    rows = [
        (
            f"{row['first']} - {row['second']}",
            row["budget"],
            f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})",
            f"{row['p']:.3f}",
        )
        for row in report["comparisons"]
        if row["metric"] == "auc" and row["method"] == "logistic_regression" and row["difference"] is not None
    ]
    if not rows:
        return []
    table = markdown_table(("vectors", "slides", "difference", "p"), rows)
    return ["## Differences in AUC (logistic regression)", table]


def _how_to_read(report: dict[str, Any]) -> str:
    settings = report["settings"]
    return "\n".join(
        (
            "- Vectors are scaled to length 1. Logistic regression: C = 10, balanced classes. kNN: "
            f"{settings['neighbours']} neighbours, a fifth of the training slides at most; vectors centred first.",
            "- mean_pool is the mean of a slide's tile features; random_encoder the same architecture with random "
            "weights: what training brought is the distance to both.",
            f"- A figure is the mean over {settings['repeats']} repetitions, which draw the training slides anew "
            "(class by class; few of them are a part of many) and, without splits, the folds. In brackets its 95 % "
            f"interval: percentiles of {settings['draws']} bootstrap draws of the scored patients (class by class) and "
            "of the repetitions.",
            "- AUC is the mean over classes of one against the rest, over the pairs of slides within each fold, all "
            "folds together: models of two folds need not agree in scale. Macro-F1 is over all scored slides.",
            "- p: twice the share of draws in which the difference has the other sign or is 0; it is not corrected for "
            "the number of comparisons.",
            "- The intervals tell how far the figures would move with other patients of this data set, not with "
            "another training of the encoder, nor of other scanners or laboratories.",
            *(f"- Note: {note}." for note in report["notes"]),
        )
    )
