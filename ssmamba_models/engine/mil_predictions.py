"""Predictions of slides as CSV, written and read back."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssmamba_models.data.csv_rows import column_places, read_csv_rows
from ssmamba_models.output import whole_file

_PROBABILITY = "probability_"


@dataclass(frozen=True)
class SlidePrediction:
    """What an aggregator says of a slide.

    Attributes:
        slide: its name.
        tiles: number of its tiles.
        probabilities: one for each class.
        label, patient, fold: of a slide with a label that a fold was tested on; else None.
    """

    slide: str
    tiles: int
    probabilities: tuple[float, ...]
    label: str | None = None
    patient: str | None = None
    fold: int | None = None


def write_predictions(
    path: Path, predictions: Sequence[SlidePrediction], classes: Sequence[str], overwrite: bool = True
) -> None:
    """Write slide, tiles, prediction and a probability per class; where there are labels also patient, fold and label.

    Raises:
        OSError: it cannot be written, or exists and may not be replaced.
    """
    tested = any(prediction.label is not None for prediction in predictions)
    head = ["slide", "patient", "fold", "label"] if tested else ["slide"]
    with whole_file(path, overwrite) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*head, "tiles", "prediction", *(_PROBABILITY + name for name in classes)])
        for row in predictions:
            known = [row.slide, row.patient, row.fold, row.label] if tested else [row.slide]
            choice = classes[int(np.argmax(row.probabilities))]
            # Twelve digits: enough for the ranks, and with them the AUC, to be those of the report.
            writer.writerow([*known, row.tiles, choice, *(f"{value:.12g}" for value in row.probabilities)])


def read_predictions(path: Path) -> tuple[list[SlidePrediction], tuple[str, ...]]:
    """Read what `write_predictions` wrote of tested slides: the predictions, and the classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of predictions with labels.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the predictions {str(path)!r} do not exist; `ssmamba mil train` writes them")
    columns, lines = read_csv_rows(path, "slide")
    classes = tuple(name.removeprefix(_PROBABILITY) for name in columns if name.startswith(_PROBABILITY))
    places = column_places(path, columns, ("slide", "patient", "fold", "label", "tiles"))
    if not classes or len(places) < 5 or len(set(classes)) < len(classes):
        raise ValueError(f"{str(path)!r} does not hold predictions of slides with labels")
    return [_prediction(path, number, dict(zip(columns, fields)), classes) for number, fields in lines], classes


def _prediction(path: Path, line: int, row: dict[str, str], classes: Sequence[str]) -> SlidePrediction:
    try:
        chances = tuple(float(row[_PROBABILITY + name]) for name in classes)
        if not np.isfinite(chances).all():
            raise ValueError("a probability is not finite")
        return SlidePrediction(row["slide"], int(row["tiles"]), chances, row["label"], row["patient"], int(row["fold"]))
    except ValueError as error:
        raise ValueError(f"{str(path)!r}, line {line}: {error}; `ssmamba mil train` writes it again") from error
