"""The hyper-parameters of a training of aggregators (multiple-instance learning)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ssmamba_models.engine.config import check_ranges, check_types
from ssmamba_models.engine.train_config import INFINITE


@dataclass(frozen=True, kw_only=True)
class MilConfig:
    """What a training of an aggregator needs to know; types and ranges are checked when one is made.

    Attributes:
        features: folder of feature files, one per slide.
        labels: CSV with the columns slide, label and, each optional, patient and split.
        aggregator: one of `list_aggregators()`.
        aggregator_args: further arguments of `create_aggregator`.
        skip_missing: leave out labelled slides without a feature file.
        folds: patient-grouped, stratified folds of cross-validation; unused where the labels have splits.
        val_fraction: share of a fold's training patients held out for early stopping, where there is no split "val".
        epochs: most passes over the slides.
        patience: epochs without a lower validation loss after which a fold ends.
        batch_size: slides per step, one at a time in memory.
        lr: peak learning rate.
        min_lr: where the cosine ends.
        warmup_epochs: of linear rise.
        optimizer: "adamw" or "muon", as in `TrainConfig`.
        betas, weight_decay: of AdamW; norms, biases and what the model names are not decayed.
        clip_grad: largest norm of the gradient; None does not clip.
        balance: "loss" weights each slide's loss by the inverse frequency of its class, "sampler" draws all classes
            equally often (with replacement), "none" does neither.
        max_tiles: in training, slides with more tiles show so many, drawn anew each epoch; None shows all. Prediction
            always sees all.
        cache_gb: memory for feature files, so that they are read once; 0 reads them in each epoch.
        precision: "fp32", "bf16" (autocast), or "auto": bf16 where a GPU computes in it.
        seed: of folds, weights, order and tiles.
        threads: CPU threads; None takes the cores that this process may use (see `threads.use_threads`).
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
    """

    features: str
    labels: str
    aggregator: str = "mambamil"
    aggregator_args: dict[str, Any] = field(default_factory=dict)
    skip_missing: bool = False
    folds: int = 5
    val_fraction: float = 0.2
    epochs: int = 50
    patience: int = 10
    batch_size: int = 1
    lr: float = 1e-4
    min_lr: float = 0.0
    warmup_epochs: float = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip_grad: float | None = 1.0
    balance: Literal["none", "loss", "sampler"] = "loss"
    max_tiles: int | None = 20_000
    cache_gb: float = 2.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    threads: int | None = None
    device: str | None = None

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "folds": (2, INFINITE),
        "val_fraction": (0.01, 0.5),
        "epochs": (1, INFINITE),
        "patience": (1, INFINITE),
        "batch_size": (1, INFINITE),
        "lr": (1e-12, 10),
        "min_lr": (0, 10),
        "warmup_epochs": (0, INFINITE),
        "weight_decay": (0, 10),
        "clip_grad": (1e-6, INFINITE),
        "max_tiles": (1, INFINITE),
        "cache_gb": (0, INFINITE),
        "seed": (0, 2**63 - 1),
        "threads": (1, INFINITE),
    }
    # What a resumed run may change: nothing that its numbers depend on. Features and labels may move; what they hold is
    # compared.
    HARMLESS: ClassVar[frozenset[str]] = frozenset({"features", "labels", "cache_gb", "threads", "device"})

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, self.RANGES)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {list(self.betas)}, expected two numbers from 0 to less than 1")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}, expected at most lr, which is {self.lr:g}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr

    @property
    def warmup(self) -> float:
        """The epochs of warm-up."""
        return self.warmup_epochs
