"""Supervised fine-tuning of a classifier on labelled tiles: `ssmamba finetune` in Python."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.data.transforms_factory import transforms_imagenet_train
from timm.optim import param_groups_layer_decay
from torch import nn

from ssmamba_models._version import __version__
from ssmamba_models.data.augment import SeededTransform
from ssmamba_models.data.labelled import LabelledTiles, group_fraction, group_split, read_tiles
from ssmamba_models.data.seeded import SeededTiles
from ssmamba_models.data.tiles import TileDataset
from ssmamba_models.engine.classifier import Classifier, inverse_frequencies
from ssmamba_models.engine.encoder import measure_embed_dim
from ssmamba_models.engine.finetune_config import FinetuneConfig
from ssmamba_models.engine.finetune_report import describe_tiles, write_metrics, write_predictions
from ssmamba_models.engine.loop import Task, Trainer, TrainResult, global_batches
from ssmamba_models.engine.metrics import classification_metrics, require_torchmetrics
from ssmamba_models.engine.network import create_network, told_args, told_name
from ssmamba_models.engine.optimisation import undecayed_names
from ssmamba_models.engine.processes import create_accelerator
from ssmamba_models.engine.run_folder import open_run, without_lost_init
from ssmamba_models.engine.run_log import RunLog
from ssmamba_models.engine.validation import Predictions, Validation
from ssmamba_models.threads import threaded

# Of weights that are loaded, after MAE's fine-tuning (arXiv:2111.06377, appendix A.1).
LAYER_DECAY = 0.65


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning did.

    Attributes:
        training: steps, stop, unreadable tiles.
        classes: names, in the order of the logits.
        best: epoch, loss and metrics (see `classification_metrics`) of the weights that were kept; empty where the run
            was stopped before its first epoch ended.
    """

    training: TrainResult
    classes: tuple[str, ...]
    best: dict[str, Any]


@threaded
def finetune(
    config: FinetuneConfig, out: str | os.PathLike, *, resume: bool = False, progress: bool = True
) -> FinetuneResult:
    """Train a classifier on labelled tiles, and validate it on groups that it never saw.

    Writes the run folder: config.yaml, log.jsonl, tensorboard/, checkpoints/, and of the epoch with the best macro-F1
    (of equal ones the lower loss) weights.safetensors (the plain timm state dict, classifier included), metrics.json
    and predictions.csv. Started by `accelerate launch` or torchrun it trains on all their processes.

    Args:
        config: the hyper-parameters.
        out: the run folder.
        resume: go on from the newest checkpoint of `out`, to the numbers that an unbroken run would give.
        progress: draw a progress bar on stderr.

    Returns:
        What was done, and how good the best epoch was.

    Raises:
        ValueError: tiles without labels, fewer than two classes, a class without training tiles, a setting that does
            not fit, no readable tile, or a training that diverges.
        FileExistsError: `out` holds a run, and `resume` is False.
        OSError: the data or the run folder is not usable.
        ImportError: accelerate, torchmetrics, tensorboard or PyYAML is missing.
    """
    require_torchmetrics()
    train, val = select_sets(config)
    accelerator = create_accelerator(config.device)
    # What can fail does so before the run folder is made.
    global_batches(config, len(train), accelerator)
    mixup = _create_mixup(config, len(train.classes), accelerator.num_processes)
    network = create_network(without_lost_init(config, out, resume), len(train.classes))
    _check_size(network, config)
    data = _training_data(config, train, network)
    classifier = _create_classifier(config, network, train, mixup)
    with open_run(out, config, resume, main=accelerator.is_main_process) as run:
        accelerator.wait_for_everyone()
        judge = _Judge(config, run, train, val, _create_validation(config, val, train.classes, network, accelerator))
        task = Task(
            module=classifier,
            data=data,
            export=judge.export,
            groups=_parameter_groups(config, network),
            epoch_end=judge.end_epoch,
            weights=_sampling_weights(train) if config.balance == "sampler" else None,
            memory=judge,
        )
        trainer = Trainer(config, run, task, accelerator, progress=progress)
        if progress:
            trainer.log.tell(_announce(train, val))
        return FinetuneResult(trainer.train(), train.classes, judge.best)


def select_sets(config: FinetuneConfig) -> tuple[LabelledTiles, LabelledTiles]:
    """The tiles to train on and those to validate with, as a config says; no group is in both.

    Raises:
        ValueError: no labels, fewer than two classes, or a class without training tiles; also as `read_tiles` and
            `group_split`.
        FileNotFoundError, NotADirectoryError, OSError: as `read_tiles`.
    """
    tiles = read_tiles(config.data)
    if tiles.labels is None:
        raise ValueError(
            f"the tiles in {str(tiles.root)!r} have no labels; put each in a folder of its class, or add a "
            "manifest.csv with the columns path,label"
        )
    tiles = tiles.select(classes=config.classes)
    if len(tiles.classes) < 2:
        raise ValueError(
            f"the tiles in {str(tiles.root)!r} are all of one class, {tiles.classes[0]!r}; a classifier needs two or "
            "more: name each in a folder or in the manifest's column 'label'"
        )
    train_places, val_places = group_split(
        tiles, config.val_fraction, config.split_seed, config.split, config.val_split
    )
    train, val = tiles.subset(train_places), tiles.subset(val_places)
    missing = sorted(set(tiles.classes) - set(train.classes))
    if missing:
        raise ValueError(
            f"no tile to train on is of class {', '.join(missing)}: all of them are in other splits; move some groups "
            f"to {config.split!r}, or name the other classes with --classes"
        )
    return train.subset(group_fraction(train, config.train_fraction, config.seed)), val


def _announce(train: LabelledTiles, val: LabelledTiles) -> str:
    def counted(tiles: LabelledTiles) -> str:
        groups = describe_tiles(tiles)["groups"]
        return f"{len(tiles)} tiles" + ("" if groups is None else f" of {groups} groups")

    absent = sorted(set(train.classes) - set(val.classes))
    note = f"; no validation tile is of class {', '.join(absent)}" if absent else ""
    return f"{len(train.classes)} classes; training on {counted(train)}, validating on {counted(val)}{note}"


def _check_size(network: nn.Module, config: FinetuneConfig) -> None:
    """Find out now, not in the first step, that a network cannot take its images or gives no logits."""
    network.eval()
    size = (3, config.img_size, config.img_size)
    measure_embed_dim(network, config.model, size, torch.device("cpu"))
    network.train()


def _create_mixup(config: FinetuneConfig, num_classes: int, processes: int) -> Mixup | None:
    if config.mixup == config.cutmix == 0:
        return None
    parts = processes * config.accumulate
    if config.batch_size // parts % 2:
        raise ValueError(
            f"mixup mixes pairs, but a batch of {config.batch_size} in {parts} parts has {config.batch_size // parts} "
            "tiles a part, an odd number; change --batch-size"
        )
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes)


def _create_classifier(
    config: FinetuneConfig, network: nn.Module, train: LabelledTiles, mixup: Mixup | None
) -> Classifier:
    weights = inverse_frequencies(_targets(train, train.classes), len(train.classes))
    return Classifier(
        network,
        label_smoothing=config.label_smoothing,
        class_weights=weights if config.balance == "loss" else None,
        mixup=mixup,
        frozen=config.freeze_encoder,
    )


def _targets(tiles: LabelledTiles, classes: tuple[str, ...]) -> list[int]:
    places = {name: place for place, name in enumerate(classes)}
    return [places[label] for label in tiles.labels]


def _sampling_weights(train: LabelledTiles) -> torch.Tensor:
    targets = _targets(train, train.classes)
    return inverse_frequencies(targets, len(train.classes))[targets]


def _training_data(config: FinetuneConfig, train: LabelledTiles, network: nn.Module) -> SeededTiles:
    augmentation = SeededTransform(_create_augmentation(config, resolve_model_data_config(network)))
    return SeededTiles(train, augmentation, config.seed, _targets(train, train.classes))


def _create_augmentation(config: FinetuneConfig, model: Mapping[str, Any]) -> Callable:
    try:
        # As create_transform, which has no switch for colour jitter beside a policy.
        return transforms_imagenet_train(
            config.img_size,
            scale=config.crop_scale,
            hflip=config.hflip,
            vflip=config.vflip,
            color_jitter=config.color_jitter,
            force_color_jitter=config.color_jitter > 0,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            interpolation=model["interpolation"],
            mean=model["mean"],
            std=model["std"],
        )
    # What timm raises for a policy that it does not know; the other settings have been checked.
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"auto_augment is {config.auto_augment!r}, expected a policy of timm such as rand-m9-mstd0.5 ({error})"
        ) from error


def _create_validation(
    config: FinetuneConfig, val: LabelledTiles, classes: tuple[str, ...], network: nn.Module, accelerator: Any
) -> Validation:
    model = resolve_model_data_config(network, {"img_size": config.img_size})
    batch_size = max(1, config.batch_size // (accelerator.num_processes * config.accumulate))
    data = TileDataset(val, create_transform(**model, is_training=False))
    return Validation(data, _targets(val, classes), accelerator, batch_size, config.workers)


def _parameter_groups(config: FinetuneConfig, network: nn.Module) -> list[dict[str, Any]] | None:
    decay = config.layer_decay
    if decay is None:
        decay = 1.0 if config.init == "none" else LAYER_DECAY
    if decay == 1:
        return None
    return param_groups_layer_decay(
        network, config.weight_decay, no_weight_decay_list=undecayed_names(network), layer_decay=decay
    )


class _Judge:
    """Validates after epochs, and keeps the best epoch's weights and metrics through checkpoints."""

    def __init__(
        self, config: FinetuneConfig, run: Path, train: LabelledTiles, val: LabelledTiles, validation: Validation
    ):
        self.config, self.run, self.validation = config, run, validation
        self.sets, self.classes = {"train": train, "val": val}, train.classes
        self.best: dict[str, Any] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def end_epoch(self, epoch: int, classifier: Classifier, log: RunLog) -> Mapping[str, Any]:
        if epoch % self.config.validate_every and epoch != self.config.epochs:
            return {}
        predictions = self.validation.predict(classifier.network)
        if not math.isfinite(predictions.loss):
            raise FloatingPointError(f"validation loss {predictions.loss}")
        metrics = classification_metrics(predictions.targets, predictions.probabilities, self.classes)
        found = {"epoch": epoch, "loss": predictions.loss, **metrics}
        if not self.best or _rank(found) > _rank(self.best):
            self.best = found
            self.weights = {
                name: value.detach().cpu().clone() for name, value in classifier.network.state_dict().items()
            }
            if log.main:
                write_predictions(self.run / "predictions.csv", self.sets["val"], predictions, self.classes)
        if log.main:
            self._write(found, predictions, log)
        return {f"val_{name}": found[name] for name in ("loss", "accuracy", "macro_f1", "macro_auc")}

    def _write(self, found: dict[str, Any], predictions: Predictions, log: RunLog) -> None:
        paths = self.sets["val"].paths
        unreadable = {paths[place]: reason for place, reason in predictions.unreadable}
        if found["epoch"] == min(self.config.validate_every, self.config.epochs):
            for path, reason in unreadable.items():
                log.tell(f"unreadable, not validated: {path!r}: {reason}")
        write_metrics(self.run / "metrics.json", self.classes, self.sets, self.best, found, unreadable)

    def export(self, classifier: Classifier) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The best epoch's weights; before an epoch has ended those of the moment."""
        described = {
            "model": told_name(self.config.model, classifier.network),
            "method": "finetune",
            "img_size": str(self.config.img_size),
            "num_classes": str(len(self.classes)),
            "classes": json.dumps(self.classes),
            "epochs": str(self.config.epochs),
            "data": self.sets["train"].sha256(),
            "ssmamba_models_version": __version__,
            **told_args(classifier.network, self.config.model_args),
        }
        if not self.best:
            return dict(classifier.network.state_dict()), {**described, "selected": "not validated yet"}
        score = f"epoch {self.best['epoch']}, the best by macro-F1 on validation tiles ({self.best['macro_f1']:.4f})"
        return self.weights, {**described, "selected": score}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.weights = state["best"], state["weights"]


def _rank(found: dict[str, Any]) -> tuple[float, float]:
    return found["macro_f1"], -found["loss"]
