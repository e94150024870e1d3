"""Training aggregators by cross-validation, in a run folder that an interrupted training goes on in.

RUN/ gets config.yaml, slides.json (what it was trained on), fold-<i>/ (weights.safetensors, predictions.csv, fold.json)
for each fold that is done and, at the end, weights.safetensors (of the fold with the lowest validation loss) and
predictions.csv (of every slide, by the fold that did not learn from it).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ssmamba_models.data.bags import Bags, read_bags
from ssmamba_models.engine.device import resolve_device
from ssmamba_models.engine.mil_config import MilConfig
from ssmamba_models.engine.mil_data import BagReader
from ssmamba_models.engine.mil_fit import Fit
from ssmamba_models.engine.mil_folds import MilFold, make_folds
from ssmamba_models.engine.mil_model import WEIGHTS, save_mil_model
from ssmamba_models.engine.mil_predictions import SlidePrediction, read_predictions, write_predictions
from ssmamba_models.engine.run_folder import open_run
from ssmamba_models.output import whole_file
from ssmamba_models.progress import progress_bar
from ssmamba_models.slide.aggregators import create_aggregator
from ssmamba_models.threads import threaded

PREDICTIONS, SLIDES, FOLD = "predictions.csv", "slides.json", "fold.json"


@dataclass(frozen=True)
class MilResult:
    """What a training of an aggregator gave.

    Attributes:
        run: the run folder.
        classes: names, sorted.
        folds: for each fold its fold (from 0), slides ("train", "val", "test"), best_epoch, val_loss and history.
        best_fold: the one whose weights are the run's.
        predictions: of every tested slide.
        unlabelled: slides with features that the labels do not name.
        missing: slides of the labels without features, where they were left out.
    """

    run: Path
    classes: tuple[str, ...]
    folds: tuple[dict[str, Any], ...]
    best_fold: int
    predictions: tuple[SlidePrediction, ...]
    unlabelled: tuple[str, ...]
    missing: tuple[str, ...]


@threaded
def train_mil(config: MilConfig, out: str | os.PathLike, *, resume: bool = False, progress: bool = True) -> MilResult:
    """Train an aggregator on the features of slides.

    Args:
        config: the hyper-parameters.
        out: the run folder; its parent must exist.
        resume: go on with the run in `out`: folds that are done are kept, the others trained anew. The result is that
            of an unbroken run.
        progress: draw a progress bar.

    Returns:
        What the folds gave.

    Raises:
        ValueError: features, labels, aggregator or folds do not fit (see `read_bags`, `create_aggregator`,
            `make_folds`), the loss is not finite, or the run was begun with other settings or slides.
        FileNotFoundError, FileExistsError, OSError: something to read is not there, or the run cannot be written.
        ImportError: an optional package is missing; the message names the extra.
    """
    bags = read_bags(config.features, config.labels, skip_missing=config.skip_missing)
    folds = make_folds(bags, config)
    device = resolve_device(config.device)
    # Wrong arguments must show before a folder is made.
    create_aggregator(config.aggregator, bags.feature_dim, len(bags.classes), **config.aggregator_args)
    with open_run(out, config, resume) as run:
        _remember(run, bags)
        reader = BagReader(bags, config.cache_gb * 1e9)
        total = len(folds) * config.epochs
        with progress_bar("mil", "epoch", progress, total=total) as bar:
            for number, fold in enumerate(folds):
                if not (_folder(run, number) / FOLD).is_file():
                    _train_fold(config, bags, fold, number, reader, device, run, bar)
                # Folds stop early, or were done by an earlier run.
                bar.update((number + 1) * config.epochs - bar.n)
        return _finish(run, bags, len(folds))


def _remember(run: Path, bags: Bags) -> None:
    """Write what the run is trained on, or see that it is what it was."""
    file = run / SLIDES
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["sha256"] != bags.sha256():
            raise ValueError(
                f"{str(run)!r} was begun with other slides, labels, splits or features (now {len(bags)} slides, then "
                f"{before['slides']}); restore them, or begin another run with another --out"
            )
        return
    _write_json(
        file,
        {
            "sha256": bags.sha256(),
            "slides": len(bags),
            "patients": len(set(bags.patients)),
            "slides_per_class": {name: sum(bag.label == name for bag in bags.bags) for name in bags.classes},
            "tiles": sum(bag.tiles for bag in bags.bags),
            "provenance": bags.provenance,
            "unlabelled": list(bags.unlabelled),
            "missing": list(bags.missing),
        },
    )


def _folder(run: Path, number: int) -> Path:
    return run / f"fold-{number}"


def _train_fold(
    config: MilConfig, bags: Bags, fold: MilFold, number: int, reader: BagReader, device: torch.device, run: Path,
    bar: tqdm,
) -> None:  # fmt: skip
    def tell(record: dict[str, Any]) -> None:
        bar.update()
        bar.set_postfix_str(f"fold {number + 1}, val loss {record['val_loss']:.4f}", refresh=False)

    fit = Fit(config, bags, fold, number, reader, device)
    result = fit.run(tell)
    probabilities = fit.predictor.logits(fold.test).softmax(dim=1).tolist()
    tested = [bags.bags[place] for place in fold.test]
    predictions = [
        SlidePrediction(bag.slide, bag.tiles, tuple(row), bag.label, bag.patient, number)
        for bag, row in zip(tested, probabilities)
    ]
    folder = _folder(run, number)
    folder.mkdir(exist_ok=True)
    save_mil_model(
        folder / WEIGHTS,
        result.model,
        config.aggregator,
        result.model.rebuild_arguments(config.aggregator_args),
        bags.classes,
        bags.provenance,
    )
    write_predictions(folder / PREDICTIONS, predictions, bags.classes)
    slides = {name: [bags.bags[place].slide for place in getattr(fold, name)] for name in ("train", "val", "test")}
    record = {"fold": number, "best_epoch": result.best_epoch, "val_loss": result.val_loss}
    # Written last: with it, the fold is done.
    _write_json(folder / FOLD, {**record, "history": result.history, "slides": slides})


def _finish(run: Path, bags: Bags, count: int) -> MilResult:
    folds = [json.loads((_folder(run, number) / FOLD).read_text(encoding="utf-8")) for number in range(count)]
    best = min(folds, key=lambda record: record["val_loss"])["fold"]
    predictions = [row for number in range(count) for row in read_predictions(_folder(run, number) / PREDICTIONS)[0]]
    write_predictions(run / PREDICTIONS, predictions, bags.classes)
    with whole_file(run / WEIGHTS, overwrite=True) as part:
        shutil.copyfile(_folder(run, best) / WEIGHTS, part)
    return MilResult(run, bags.classes, tuple(folds), best, tuple(predictions), bags.unlabelled, bags.missing)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with whole_file(path, overwrite=True) as part:
        part.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
