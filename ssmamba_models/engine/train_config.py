"""The hyper-parameters that every training has."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ssmamba_models.engine.config import check_ranges, check_types

INFINITE = math.inf


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every training needs to know, of tiles or slides; types and ranges are checked when one is made.

    Attributes:
        epochs: passes over the data.
        batch_size: tiles per step, over all processes.
        accumulate: parts that each process cuts its share of a batch into, to need less memory. What compares the
            tiles of a batch (a contrastive loss, mixup) sees those of a part.
        lr: peak learning rate; None takes base_lr * batch_size / 256.
        min_lr: where the cosine ends.
        warmup_epochs: of linear rise; None takes a tenth of the epochs.
        optimizer: "adamw", or "muon": matrices by orthogonalised momentum, the rest by AdamW, with
            the same learning rates. More work per step, most of it independent of the batch, and fewer steps. Or "sgd":
            with classical momentum, the first of `betas`.
        betas: of the optimiser's averages; "sgd" has the first alone.
        weight_decay: norms, biases and what the model names are not decayed. That of "sgd" is an l2 penalty.
        clip_grad: largest norm of the gradient; None does not clip.
        ema_decay: of an exponential moving average of the weights, which is then what is exported; None keeps none.
        precision: "fp32", "bf16" (autocast), or "auto": bf16 where a GPU computes in it.
        seed: of weights, order and views.
        workers: processes that read tiles, per training process; None chooses by the machine.
        threads: CPU threads of each process; None takes the cores that it may use (see `threads.use_threads`).
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
        log_every: steps between two lines of log.jsonl.
        checkpoint_minutes, checkpoint_steps, checkpoint_epochs: a checkpoint at least this often; None: not by that
            measure.
        keep_checkpoints: how many are kept.
    """

    epochs: int = 100
    batch_size: int = 256
    accumulate: int = 1
    lr: float | None = None
    base_lr: float = 1.5e-4
    min_lr: float = 0.0
    warmup_epochs: float | None = None
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_grad: float | None = 1.0
    ema_decay: float | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    workers: int | None = None
    threads: int | None = None
    device: str | None = None
    log_every: int = 10
    checkpoint_minutes: float | None = 10.0
    checkpoint_steps: int | None = None
    checkpoint_epochs: int | None = 1
    keep_checkpoints: int = 2

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "epochs": (1, INFINITE),
        "batch_size": (1, INFINITE),
        "accumulate": (1, INFINITE),
        "lr": (1e-12, 10),
        "base_lr": (1e-12, 10),
        "min_lr": (0, 10),
        "warmup_epochs": (0, INFINITE),
        "weight_decay": (0, 10),
        "clip_grad": (1e-6, INFINITE),
        "ema_decay": (0, 0.999999),
        "seed": (0, 2**63 - 1),
        "workers": (0, 1024),
        "threads": (1, INFINITE),
        "log_every": (1, INFINITE),
        "checkpoint_minutes": (0, INFINITE),
        "checkpoint_steps": (1, INFINITE),
        "checkpoint_epochs": (1, INFINITE),
        "keep_checkpoints": (1, INFINITE),
    }
    # What a resumed run may change: nothing that its numbers depend on.
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {"workers", "threads", "device", "log_every"}
        | {"checkpoint_minutes", "checkpoint_steps", "checkpoint_epochs", "keep_checkpoints"}
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, self.RANGES)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {list(self.betas)}, expected two numbers from 0 to less than 1")
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs:g}, expected less than epochs, which is {self.epochs}"
            )
        if self.min_lr > self.peak_lr:
            raise ValueError(f"min_lr is {self.min_lr}, expected at most the peak learning rate, {self.peak_lr:g}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.base_lr * self.batch_size / 256 if self.lr is None else self.lr

    @property
    def warmup(self) -> float:
        """The epochs of warm-up."""
        return 0.1 * self.epochs if self.warmup_epochs is None else self.warmup_epochs


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """What a training on tiles needs to know; see `LoopConfig` for what is not listed here.

    Attributes:
        data: folder of tiles.
        classes: take the tiles of these classes alone; None takes all.
        split: where the data has splits, take this one.
        model: a timm name.
        model_args: further arguments of `timm.create_model`.
        drop_path_rate: stochastic depth; None takes the model's own.
        init: where the weights come from: "none" (random), "pretrained", a file, or a run folder.
        img_size: side of the input in pixels.
    """

    data: str
    classes: tuple[str, ...] | None = None
    split: str = "train"
    model: str = "ssmamba_small"
    model_args: dict[str, Any] = field(default_factory=dict)
    drop_path_rate: float | None = None
    init: str = "none"
    img_size: int = 224

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        **LoopConfig.RANGES,
        "drop_path_rate": (0, 0.99),
        "img_size": (1, INFINITE),
    }
    # `data` may move; its tiles are compared.
    HARMLESS: ClassVar[frozenset[str]] = LoopConfig.HARMLESS | {"data"}
