"""What an evaluation of slide vectors found, as plain data: report.json, from which report.md is written."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

from ssmamba_models.evaluation.report import versions
from ssmamba_models.evaluation.slide_data import LabelledSlides, VectorSet
from ssmamba_models.evaluation.slide_scoring import BudgetScores, SlideTask, compare_vectors

FORMAT = 1
# A bootstrap of fewer patients sees too few different test sets.
_FEW_PATIENTS = 10


def make_slide_report(
    slides: LabelledSlides, task: SlideTask, scores: dict[str, list[BudgetScores]], notes: list[str]
) -> dict[str, Any]:
    """The report as dicts, lists, strings and numbers; nothing in it depends on the time.

    Args:
        slides: the slides and their vectors.
        task: what they were scored on.
        scores: label -> scores.
        notes: what a reader should know besides.
    """
    table = slides.table
    return {
        "format": FORMAT,
        "versions": versions(),
        "settings": {**asdict(task.settings), "budgets": list(task.settings.budgets)},
        "data": {
            "labels": str(table.root),
            "sha256": table.sha256(),
            "slides": len(table),
            "patients": None if table.groups is None else len(set(table.groups)),
            "slides_per_class": dict(sorted(Counter(table.labels).items())),
            "unlabelled": list(slides.unlabelled),
            "missing": list(slides.missing),
        },
        "protocol": {
            "kind": task.protocol.kind,
            "test_split": task.protocol.test_split,
            "folds": len(task.protocol.seeds[0]),
            "scored_slides": len(task.protocol.test),
            "scored_patients": task.resampling.count,
        },
        "classes": list(task.task.classes),
        "vectors": [_describe(one) for one in slides.sets],
        "results": {label: [_scores(entry) for entry in entries] for label, entries in scores.items()},
        "comparisons": [_known(row) for row in compare_vectors(scores)],
        "notes": [*_notes(slides, task), *notes],
        "plots": [],
    }


def _describe(one: VectorSet) -> dict[str, Any]:
    return {
        "label": one.label,
        "file": one.file,
        "baseline": one.baseline,
        "embed_dim": int(one.vectors.shape[1]),
        "attributes": dict(sorted(one.attributes.items())),
    }


def _scores(entry: BudgetScores) -> dict[str, Any]:
    return {
        "budget": entry.budget,
        "train_slides": list(entry.train),
        "method": entry.method,
        "metrics": {name: _known(estimate.as_dict()) for name, estimate in entry.estimates.items()},
    }


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what cannot be told is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return {key: plain(value) for key, value in row.items()}


def _notes(slides: LabelledSlides, task: SlideTask) -> list[str]:
    notes = []
    if slides.table.groups is None:
        notes.append(
            "the labels have no column patient: slides of one patient may be on both sides of a split, which flatters "
            "every figure, and the intervals take each slide for an independent witness, which makes them too narrow"
        )
    if not any(one.baseline for one in slides.sets):
        notes.append(
            "no baseline stands beside these vectors, so nothing tells what pre-training brought; --features DIR adds "
            "the mean of the tiles' features and a random encoder"
        )
    if task.left_out:
        notes.append(
            f"left out, since a fit has no more training slides than that: {', '.join(task.left_out)} training slides"
        )
    if task.resampling.count < _FEW_PATIENTS:
        notes.append(f"{task.resampling.count} patients are scored, too few to trust the intervals")
    return notes
