"""How good a classifier is: accuracy, macro-F1 and macro AUC, by class, and its confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch


def require_torchmetrics() -> ModuleType:
    """Import torchmetrics' functions for classification.

    Raises:
        ImportError: torchmetrics is missing or broken; the message names the extra that installs it.
    """
    try:
        from torchmetrics.functional import classification
    except ImportError as error:
        raise ImportError(
            f'metrics need torchmetrics ({error}); install it with: pip install "ssmamba-models[train]"'
        ) from error
    return classification


def classification_metrics(
    targets: torch.Tensor, probabilities: torch.Tensor, classes: Sequence[str]
) -> dict[str, Any]:
    """Metrics of predictions.

    Args:
        targets: (N,) int64, class indices.
        probabilities: (N, K); the most probable class is the prediction.
        classes: the K names.

    Returns:
        accuracy; macro_f1, the mean over the classes that occur among targets or predictions; macro_auc, the mean of
        one-vs-rest areas under the ROC curve over the classes for which both kinds occur (None where there is none);
        per_class, name -> precision, recall, f1, auc and support (number of targets); confusion_matrix, K rows of
        targets by K columns of predictions, in the order of `classes`.

    Raises:
        ImportError: torchmetrics is missing.
    """
    metrics = require_torchmetrics()
    count = len(classes)
    predictions = probabilities.argmax(dim=1)
    confusion = metrics.multiclass_confusion_matrix(predictions, targets, count)
    options = {"num_classes": count, "average": "none"}
    columns = {
        "precision": metrics.multiclass_precision(predictions, targets, **options),
        "recall": metrics.multiclass_recall(predictions, targets, **options),
        "f1": metrics.multiclass_f1_score(predictions, targets, **options),
    }
    support = confusion.sum(dim=1).tolist()
    areas = _areas(metrics, targets, probabilities, support)
    return {
        "accuracy": metrics.multiclass_accuracy(predictions, targets, count, average="micro").item(),
        "macro_f1": metrics.multiclass_f1_score(predictions, targets, count, average="macro").item(),
        "macro_auc": _mean([area for area in areas if area is not None]),
        "per_class": {
            name: {
                **{column: values[index].item() for column, values in columns.items()},
                "auc": areas[index],
                "support": support[index],
            }
            for index, name in enumerate(classes)
        },
        "confusion_matrix": confusion.tolist(),
    }


def _areas(
    metrics: ModuleType, targets: torch.Tensor, probabilities: torch.Tensor, support: list[int]
) -> list[float | None]:
    """The area of each class against the rest; None where all targets, or none, are of the class."""
    return [
        metrics.binary_auroc(probabilities[:, index], (targets == index).long()).item()
        if 0 < count < len(targets)
        else None
        for index, count in enumerate(support)
    ]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
