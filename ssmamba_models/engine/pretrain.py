"""Self-supervised pretraining of an encoder on tiles: `ssmamba pretrain` in Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from timm.data import resolve_model_data_config
from torch import nn

from ssmamba_models._version import __version__
from ssmamba_models.data.labelled import LabelledTiles, read_tiles
from ssmamba_models.data.seeded import SeededTiles
from ssmamba_models.data.spatial_tiles import SpatialTiles, read_spatial_tiles
from ssmamba_models.engine.config import check_types
from ssmamba_models.engine.loop import Task, Trainer, TrainResult, global_batches
from ssmamba_models.engine.methods import (
    complete_method_args,
    complete_view_args,
    create_module,
    create_views,
    get_method,
)
from ssmamba_models.engine.network import create_network, told_args, told_name
from ssmamba_models.engine.processes import create_accelerator
from ssmamba_models.engine.reconstructions import draw_reconstructions, fixed_batch, save_reconstructions
from ssmamba_models.engine.rng import seeded
from ssmamba_models.engine.run_folder import open_run, without_lost_init
from ssmamba_models.engine.run_log import RunLog
from ssmamba_models.engine.train_config import INFINITE, TrainConfig
from ssmamba_models.threads import threaded

# Settings of which None stands for the method's own.
_METHODS_OWN = ("optimizer", "base_lr", "weight_decay", "batch_size", "warmup_epochs")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """The hyper-parameters of a pretraining; see `TrainConfig` for those not listed here.

    Attributes:
        data: folder of tiles; for a method that needs their places a folder with a manifest.csv, or a CSV, as
            `read_spatial_tiles` reads it.
        optimizer, base_lr, weight_decay, batch_size, warmup_epochs: None takes the method's own (`Method.defaults`), or
            where it has none that of `TrainConfig`. With another optimizer than the method's own, all but the batch
            size are `TrainConfig`'s.
        method: a name of `ssmamba_models.choices.METHODS`.
        method_args: arguments of the method's module, such as cell_size; those not given are filled in.
        view_args: arguments of its views, such as mask_ratio; likewise.
        reconstruct_every: epochs between two pictures of reconstructions; None draws none.
    """

    optimizer: Literal["adamw", "muon", "sgd"] | None = None
    base_lr: float | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    method: str = "mamim"
    method_args: dict[str, Any] = field(default_factory=dict)
    view_args: dict[str, Any] = field(default_factory=dict)
    reconstruct_every: int | None = 5

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {**TrainConfig.RANGES, "reconstruct_every": (1, INFINITE)}
    HARMLESS: ClassVar[frozenset[str]] = TrainConfig.HARMLESS | {"reconstruct_every"}

    def __post_init__(self) -> None:
        check_types(self)
        method = get_method(self.method)
        own = {name: getattr(TrainConfig, name) for name in _METHODS_OWN} | dict(method.defaults)
        if self.optimizer not in (None, own["optimizer"]):
            # A rate that suits one optimiser is a hundred times that of another.
            own |= {name: getattr(TrainConfig, name) for name in _METHODS_OWN if name != "batch_size"}
        for name, value in own.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        object.__setattr__(self, "method_args", complete_method_args(method, self.method_args))
        object.__setattr__(self, "view_args", complete_view_args(method, self.view_args))


@threaded
def pretrain(
    config: PretrainConfig, out: str | os.PathLike, *, resume: bool = False, progress: bool = True
) -> TrainResult:
    """Pretrain an encoder.

    Writes the run folder: config.yaml, log.jsonl, tensorboard/, checkpoints/, weights.safetensors (the encoder's plain
    timm state dict), reconstructions/. Started by `accelerate launch` or torchrun it trains on all their processes; the
    loss curve is that of one process with the same `batch_size`.

    Args:
        config: the hyper-parameters.
        out: the run folder.
        resume: go on from the newest checkpoint of `out`, to the numbers that an unbroken run would give.
        progress: draw a progress bar on stderr.

    Returns:
        What was done.

    Raises:
        ValueError: a setting that does not fit, no readable tile, or a training that diverges.
        FileExistsError: `out` holds a run, and `resume` is False.
        OSError: the data or the run folder is not usable.
        ImportError: accelerate, tensorboard or PyYAML is missing.
    """
    tiles = select_tiles(config)
    accelerator = create_accelerator(config.device)
    # What can fail does so before the run folder is made.
    global_batches(config, len(tiles), accelerator)
    module, data = build(without_lost_init(config, out, resume), tiles)
    with open_run(out, config, resume, main=accelerator.is_main_process) as run:
        accelerator.wait_for_everyone()
        metadata = describe(config, tiles, module.encoder)
        task = Task(
            module=module,
            data=data,
            export=lambda module: (encoder_weights(module), metadata),
            step_start=getattr(module, "start_step", None),
            epoch_end=_picture_maker(config, data, run, accelerator) if hasattr(module, "reconstruct") else None,
        )
        trainer = Trainer(config, run, task, accelerator, progress=progress)
        if isinstance(tiles, SpatialTiles) and tiles.single_tile_slides():
            trainer.log.tell(_isolated(tiles))
        return trainer.train()


def select_tiles(config: PretrainConfig) -> LabelledTiles:
    """The tiles that a config names: of its split, where the data has splits, and of its classes."""
    tiles = (read_spatial_tiles if get_method(config.method).spatial else read_tiles)(config.data)
    split = None if tiles.splits is None and config.split == "train" else config.split
    return tiles.select(split, config.classes)


def build(config: PretrainConfig, tiles: LabelledTiles) -> tuple[nn.Module, SeededTiles]:
    """The method's module around a new encoder, and its data."""
    method = get_method(config.method)
    # Weights depend on the seed, whatever ran before in this process.
    with seeded(config.seed):
        encoder = create_network(config)
        bound = {"encoder": encoder, "manifest": tiles, "seed": config.seed, "steps": _steps(config, tiles)}
        module = create_module(method, config.method_args, **bound)
    statistics = resolve_model_data_config(encoder)
    views = create_views(
        method,
        config.method_args,
        config.view_args,
        img_size=config.img_size,
        mean=statistics["mean"],
        std=statistics["std"],
    )
    return module, SeededTiles(tiles, views, config.seed, indexed=method.spatial)


def _steps(config: PretrainConfig, tiles: LabelledTiles) -> int:
    return max(1, len(tiles) // config.batch_size * config.epochs)


def _isolated(tiles: SpatialTiles) -> str:
    slides = tiles.single_tile_slides()
    listed = ", ".join(slides[:3]) + (", ..." if len(slides) > 3 else "")
    return (
        f"Warning: {len(slides)} of {len(set(tiles.slides))} slides have a single tile ({listed}); it has no "
        "neighbours, and takes no part in the spatial loss"
    )


def encoder_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a method's encoder."""
    return dict(module.encoder.state_dict())


def describe(config: PretrainConfig, tiles: LabelledTiles, encoder: nn.Module) -> dict[str, str]:
    """What weights.safetensors says of itself."""
    described = {
        "model": told_name(config.model, encoder),
        "method": config.method,
        "img_size": str(config.img_size),
        "num_classes": "0",
        "classes": "[]",
        "epochs": str(config.epochs),
        "data": tiles.sha256(),
        "ssmamba_models_version": __version__,
    }
    return {**described, **told_args(encoder, config.model_args)}


def _picture_maker(
    config: PretrainConfig, data: SeededTiles, run: Path, accelerator: Any
) -> Callable[[int, nn.Module, RunLog], Mapping[str, Any]] | None:
    if config.reconstruct_every is None or not accelerator.is_main_process:
        return None
    batch = fixed_batch(data)
    steps = len(data) // config.batch_size

    def draw(epoch: int, module: nn.Module, log: RunLog) -> Mapping[str, Any]:
        if epoch % config.reconstruct_every == 0 or epoch == config.epochs:
            save_reconstructions(draw_reconstructions(module, batch), run, epoch, log, epoch * steps)
        return {}

    return draw
