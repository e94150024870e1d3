"""What a fine-tuning leaves for a reader: metrics.json, and predictions.csv of the validation tiles."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmamba_models.data.labelled import LabelledTiles
from ssmamba_models.engine.validation import Predictions
from ssmamba_models.output import whole_file


def write_metrics(
    path: Path, classes: tuple[str, ...], sets: Mapping[str, LabelledTiles], best: dict, last: dict, unreadable: dict
) -> None:
    """Write metrics.json.

    Args:
        path: the file; replaced whole.
        classes: names, in the order of the confusion matrices.
        sets: "train" and "val" -> their tiles.
        best, last: epoch, loss and metrics of the epoch whose weights are kept, and of the newest one.
        unreadable: path -> reason of the validation tiles that could not be read.
    """
    report = {
        "classes": list(classes),
        **{name: describe_tiles(tiles) for name, tiles in sets.items()},
        "best": best,
        "last": last,
        "unreadable_val": unreadable,
    }
    with whole_file(path, overwrite=True) as part:
        part.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def describe_tiles(tiles: LabelledTiles) -> dict[str, Any]:
    """Numbers of tiles, of groups (None where there are none) and of tiles per class."""
    groups = None if tiles.groups is None else len(set(tiles.groups))
    return {"tiles": len(tiles), "groups": groups, "tiles_per_class": dict(sorted(Counter(tiles.labels).items()))}


def write_predictions(path: Path, tiles: LabelledTiles, predictions: Predictions, classes: tuple[str, ...]) -> None:
    """Write predictions.csv: path, group (empty where there is none), label, prediction, a probability per class."""
    labels, chosen = tiles.known_labels, predictions.probabilities.argmax(dim=1).tolist()
    with whole_file(path, overwrite=True) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "group", "label", "prediction", *(f"probability_{name}" for name in classes)])
        for index, choice, row in zip(predictions.indices, chosen, predictions.probabilities.tolist()):
            group = "" if tiles.groups is None else tiles.groups[index]
            # Twelve digits: enough for the ranks, and with them the AUC, to be those of the metrics.
            numbers = [f"{value:.12g}" for value in row]
            writer.writerow([tiles.paths[index], group, labels[index], classes[choice], *numbers])
