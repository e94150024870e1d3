"""Self-supervised pretraining of a slide encoder on tile features: `ssmamba slide-pretrain` in Python."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ssmamba_models._version import __version__
from ssmamba_models.data.bags import Bags
from ssmamba_models.data.slide_bags import read_slides
from ssmamba_models.data.slide_labels import some_names
from ssmamba_models.engine.checkpoints import explained_writing
from ssmamba_models.engine.loop import Task, Trainer, TrainResult, global_batches
from ssmamba_models.engine.methods import complete_method_args, complete_view_args, create_views
from ssmamba_models.engine.processes import create_accelerator
from ssmamba_models.engine.rng import seeded
from ssmamba_models.engine.run_folder import open_run, without_lost_init
from ssmamba_models.engine.slide_data import SeededSlides
from ssmamba_models.engine.slide_methods import get_slide_method, slide_collate
from ssmamba_models.engine.train_config import INFINITE, LoopConfig
from ssmamba_models.models.published import CONFIG
from ssmamba_models.slide.slide_encoder import SlideEncoder
from ssmamba_models.slide.slide_encoders import create_slide_encoder
from ssmamba_models.slide.slide_weights import save_slide_encoder
from ssmamba_models.threads import threaded


@dataclass(frozen=True, kw_only=True)
class SlidePretrainConfig(LoopConfig):
    """The hyper-parameters of a slide-level pretraining; see `LoopConfig` for those not listed here.

    Attributes:
        features: folder of feature files, one per slide.
        method: a name of `ssmamba_models.choices.SLIDE_METHODS`.
        model: one of `list_slide_encoders()`; None takes the method's own.
        model_args: further arguments of `create_slide_encoder`.
        method_args: arguments of the method's module, such as temperature; those not given are filled in.
        view_args: arguments of its views, such as tiles; likewise.
        init: where the weights come from: "none" (random), a run folder or published one, or "hf-hub:ORG/NAME".
        max_tiles: slides with more tiles show so many, drawn anew each epoch, which bounds the memory; None shows all.
        cache_gb: memory (of each process that reads) for feature files, so that they are read once; 0 reads them in
            each epoch.
        weight_decay: None takes the method's own.
    """

    features: str
    method: str = "gigassl"
    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    method_args: dict[str, Any] = field(default_factory=dict)
    view_args: dict[str, Any] = field(default_factory=dict)
    init: str = "none"
    max_tiles: int | None = 20_000
    cache_gb: float = 2.0
    base_lr: float = 1e-3
    weight_decay: float | None = None

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        **LoopConfig.RANGES,
        "max_tiles": (1, INFINITE),
        "cache_gb": (0, INFINITE),
    }
    # `features` may move; what the folder holds is compared.
    HARMLESS: ClassVar[frozenset[str]] = LoopConfig.HARMLESS | {"features", "cache_gb"}

    def __post_init__(self) -> None:
        super().__post_init__()
        method = get_slide_method(self.method)
        for name, value in method.defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.batch_size // self.accumulate < method.least_slides:
            raise ValueError(
                f"batch_size is {self.batch_size} in {self.accumulate} parts; {self.method} needs "
                f"{method.least_slides} slides in each: use a larger --batch-size or fewer parts (--accumulate)"
            )
        object.__setattr__(self, "method_args", complete_method_args(method, self.method_args))
        object.__setattr__(self, "view_args", complete_view_args(method, self.view_args))


@threaded
def pretrain_slides(
    config: SlidePretrainConfig, out: str | os.PathLike, *, resume: bool = False, progress: bool = True
) -> TrainResult:
    """Pretrain a slide encoder.

    Writes the run folder: config.yaml, log.jsonl, tensorboard/, checkpoints/, and the encoder as config.json and
    model.safetensors, which `create_slide_encoder(name, feature_dim, pretrained=RUN)` loads. Started by `accelerate
    launch` or torchrun it trains on all their processes; the loss curve is that of one process with the same
    `batch_size`.

    Args:
        config: the hyper-parameters.
        out: the run folder.
        resume: go on from the newest checkpoint of `out`, to the numbers that an unbroken run would give.
        progress: draw a progress bar on stderr.

    Returns:
        What was done.

    Raises:
        ValueError: a setting that does not fit, features that do not belong together, no readable slide, or a training
            that diverges.
        FileExistsError: `out` holds a run, and `resume` is False.
        OSError: the features or the run folder are not usable.
        ImportError: accelerate, tensorboard, PyYAML or h5py is missing.
    """
    slides = read_slides(config.features)
    accelerator = create_accelerator(config.device)
    # What can fail does so before the run folder is made.
    global_batches(config, len(slides), accelerator, noun="slide")
    module, data = build_slides(_without_lost_init(config, out, resume), slides)
    with open_run(out, config, resume, main=accelerator.is_main_process) as run:
        if accelerator.is_main_process:
            _tell_plain(config, slides)
        accelerator.wait_for_everyone()
        metadata = describe_slides(config, slides)
        task = Task(
            module=module,
            data=data,
            export=lambda module: (module.encoder, metadata),
            save=_save,
            collate=slide_collate(data.transform),
            images=False,
        )
        return Trainer(config, run, task, accelerator, progress=progress).train()


def _without_lost_init(config: SlidePretrainConfig, out: str | os.PathLike, resume: bool) -> SlidePretrainConfig:
    """As `without_lost_init`; what the lost encoder was made with, the run's own config.json says."""
    random = without_lost_init(config, out, resume)
    if random.init == config.init:
        return config
    try:
        arguments = dict(json.loads((Path(out) / CONFIG).read_text(encoding="utf-8"))["arguments"])
    except (OSError, ValueError, KeyError, TypeError):
        return config  # which then says that its init is not there
    arguments.pop("feature_dim", None)
    return replace(random, model_args={**arguments, **config.model_args})


def build_slides(config: SlidePretrainConfig, slides: Bags) -> tuple[nn.Module, SeededSlides]:
    """The method's module around a new encoder, and its data."""
    method = get_slide_method(config.method)
    pretrained = False if config.init == "none" else config.init
    # Weights depend on the seed, whatever ran before in this process.
    with seeded(config.seed):
        encoder = create_slide_encoder(config.model, slides.feature_dim, pretrained, **config.model_args)
        module = method.module(encoder, **config.method_args)
    views = create_views(method, config.method_args, config.view_args, encoder=encoder)
    return module, SeededSlides(slides, views, config.seed, config.max_tiles, config.cache_gb * 1e9)


def describe_slides(config: SlidePretrainConfig, slides: Bags) -> dict[str, Any]:
    """What config.json says of a run's encoder."""
    return {
        "method": config.method,
        "method_args": config.method_args,
        "view_args": config.view_args,
        "epochs": str(config.epochs),
        "slides": len(slides),
        "slides_with_shared_augmentation": sum(bag.shared_bags > 0 for bag in slides.bags),
        "data": slides.sha256(),
        "provenance": slides.provenance,
        "ssmamba_models_version": __version__,
    }


def _tell_plain(config: SlidePretrainConfig, slides: Bags) -> None:
    plain = [bag.slide for bag in slides.bags if not bag.shared_bags]
    if plain and config.view_args.get("shared_aug"):
        print(
            f"{len(plain)} of {len(slides)} slides have no bags of shared augmentation ({some_names(plain)}): their "
            "views are drawn from the plain features; `ssmamba extract --shared-aug N` makes such bags",
            file=sys.stderr,
        )


def _save(run: Path, encoder: SlideEncoder, metadata: dict[str, Any]) -> None:
    size = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    with explained_writing(run / "model.safetensors", size):
        save_slide_encoder(encoder, run, metadata)
