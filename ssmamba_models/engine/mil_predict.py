"""Predicting slides with a trained aggregator, and how much each of their tiles counts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ssmamba_models.data.bags import Bag, Bags, check_same_provenance, feature_files, open_bag
from ssmamba_models.engine.device import resolve_device, use_bf16
from ssmamba_models.engine.mil_data import BagReader
from ssmamba_models.engine.mil_fit import BagPredictor
from ssmamba_models.engine.mil_model import WEIGHTS, MilModel, load_mil_model
from ssmamba_models.engine.mil_predictions import SlidePrediction, write_predictions
from ssmamba_models.output import check_output
from ssmamba_models.progress import progress_bar
from ssmamba_models.threads import threaded


@dataclass(frozen=True)
class PredictSummary:
    """What `predict_mil` did.

    Attributes:
        out: the CSV.
        classes: names of the probabilities.
        predictions: of each slide that could be read.
        unreadable: (file, reason) of the others, those with NaN included.
        models: how many models were averaged.
    """

    out: Path
    classes: tuple[str, ...]
    predictions: tuple[SlidePrediction, ...]
    unreadable: tuple[tuple[str, str], ...]
    models: int


@dataclass(frozen=True)
class TileScores:
    """How much the tiles of a slide count.

    Attributes:
        prediction: of the slide.
        classes: names of its probabilities.
        attention: (N,) float32, 0 or more, sum 1.
    """

    prediction: SlidePrediction
    classes: tuple[str, ...]
    attention: np.ndarray


@threaded
def predict_mil(
    run: str | os.PathLike,
    features: str | os.PathLike,
    out: str | os.PathLike,
    *,
    ensemble: bool = False,
    precision: str = "fp32",
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> PredictSummary:
    """Predict the slides of a folder of feature files.

    Slides are read one at a time and whole: memory is that of the largest.

    Args:
        run: a run folder of `train_mil`, or a weights file in it.
        features: folder of feature files, or one of them.
        out: the CSV to write; its folder must exist.
        ensemble: the mean probabilities of all folds' models, instead of the best fold's.
        precision, device: as `MilConfig`; the precision here is not that of the training.
        threads: CPU threads; None takes the cores that this process may use (see `threads.use_threads`).
        overwrite: whether an existing file may be replaced.
        progress: draw a progress bar.

    Returns:
        What was predicted, and which files could not be read.

    Raises:
        ValueError: the features are not of the kind that the model was trained on, no file can be read, or the model
            is damaged.
        FileNotFoundError, FileExistsError, OSError: something to read is not there, or the CSV cannot be written.
        ImportError: an optional package is missing; the message names the extra.
    """
    path, place = check_output(out, overwrite), resolve_device(device)
    models = [load_mil_model(file, place) for file in _weight_files(Path(run), ensemble)]
    bags, unreadable = _open_bags(features, models[0])
    predictions = []
    for number, bag in enumerate(progress_bar("predict", "slide", progress, items=bags.bags)):
        try:
            probabilities = _mean_probabilities(models, BagReader(bags, math.inf), number, precision)
        except (ValueError, OSError) as error:
            unreadable.append((str(bag.path), str(error)))
            continue
        predictions.append(SlidePrediction(bag.slide, bag.tiles, tuple(probabilities)))
    if not predictions:
        raise ValueError(f"no feature file in {str(features)!r} can be read (first: {unreadable[0][1]})")
    write_predictions(path, predictions, models[0].classes, overwrite)
    return PredictSummary(path, models[0].classes, tuple(predictions), tuple(unreadable), len(models))


def score_tiles(
    run: str | os.PathLike, features: str | os.PathLike, *, precision: str = "fp32", device: str | None = None
) -> TileScores:
    """Predict one slide, and say how much each tile counts (the aggregator's "attention").

    Args:
        run: as `predict_mil`.
        features: the slide's feature file.
        precision, device: as `MilConfig`; the precision here is not that of the training.

    Raises:
        As `predict_mil`; ValueError where features are NaN.
    """
    model = load_mil_model(run, resolve_device(device))
    bag, provenance = open_bag(features)
    _check_provenance(model, bag, provenance)
    bags = Bags(bag.path.parent, (bag,), provenance["feature_dim"], provenance)
    predictor = BagPredictor(model.model, BagReader(bags, 0), _bf16(model, precision))
    output = predictor.finite_output(0)
    probabilities = output["logits"][0].float().softmax(dim=0).tolist()
    prediction = SlidePrediction(bag.slide, bag.tiles, tuple(probabilities))
    return TileScores(prediction, model.classes, output["attention"][0].float().cpu().numpy())


def _weight_files(run: Path, ensemble: bool) -> list[Path]:
    if not ensemble:
        return [run]
    folds = sorted(run.glob(f"fold-*/{WEIGHTS}"), key=lambda path: int(path.parent.name.removeprefix("fold-")))
    if not folds:
        raise FileNotFoundError(f"{str(run)!r} has no folds (fold-0/{WEIGHTS}, ...) to average; give a run folder")
    return folds


def _open_bags(features: str | os.PathLike, model: MilModel) -> tuple[Bags, list[tuple[str, str]]]:
    bags, unreadable = [], []
    for path in feature_files(features):
        try:
            bag, provenance = open_bag(path)
        except (ValueError, OSError) as error:
            unreadable.append((str(path), str(error)))
            continue
        _check_provenance(model, bag, provenance)
        bags.append(bag)
    if not bags:
        raise ValueError(f"no feature file in {str(features)!r} can be read (first: {unreadable[0][1]})")
    width = model.provenance["feature_dim"]
    return Bags(bags[0].path.parent, tuple(bags), width, model.provenance), unreadable


def _check_provenance(model: MilModel, bag: Bag, provenance: dict) -> None:
    check_same_provenance({"what the model was trained on": model.provenance, bag.slide: provenance})


def _bf16(model: MilModel, precision: str) -> bool:
    return use_bf16(precision, next(model.model.parameters()).device)


def _mean_probabilities(models: list[MilModel], reader: BagReader, number: int, precision: str) -> list[float]:
    def each() -> Iterator[torch.Tensor]:
        for model in models:
            logits = BagPredictor(model.model, reader, _bf16(model, precision)).logits(np.array([number]))
            yield logits[0].softmax(dim=0)

    return torch.stack(list(each())).mean(dim=0).tolist()
