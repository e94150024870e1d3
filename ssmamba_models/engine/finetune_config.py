"""The hyper-parameters of a supervised training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ssmamba_models.engine.train_config import INFINITE, TrainConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """The hyper-parameters of a fine-tuning; see `TrainConfig` for those not listed here.

    Attributes:
        split, val_split: the splits to train on and to validate with, where the data has splits.
        val_fraction: share of the groups held out where there is no `val_split`.
        split_seed: draws the groups held out.
        validate_every: epochs between two validations; the last epoch is always validated.
        train_fraction: share of the training groups to use, for runs with few labels; drawn by `seed`, the smaller
            share a part of the larger.
        balance: "loss" weights each tile's loss by the inverse frequency of its class, "sampler" draws all classes
            equally often (with replacement), "none" does neither.
        layer_decay: factor on the learning rate from each layer to the one before it; 1 has no decay. None: 0.65, or 1
            where `init` is "none", since random layers have nothing to protect and much to learn.
        label_smoothing: share of the target that is spread over all classes.
        mixup, cutmix: alpha of timm's mixup and cutmix; 0 leaves it out.
        freeze_encoder: train the classifier layer alone.
        crop_scale: smallest and largest share of a tile's area that a random crop shows.
        hflip, vflip: chance of each flip.
        color_jitter: largest relative change of brightness, contrast and saturation; 0 leaves it out.
        auto_augment: a policy of timm, such as "rand-m9-mstd0.5", which comes before colour jitter and changes colours
            too; None has none.
        random_erasing: chance to erase a random rectangle.

    Source: defaults after encoder fine-tuning in MAE (arXiv:2111.06377, appendix A.1); both flips and mild colour
    jitter suit tissue, which has no upright and whose stain varies.
    """

    init: str = "pretrained"
    batch_size: int = 64
    base_lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    val_split: str = "val"
    val_fraction: float = 0.2
    split_seed: int = 0
    validate_every: int = 1
    train_fraction: float = 1.0
    balance: Literal["none", "loss", "sampler"] = "none"
    layer_decay: float | None = None
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    freeze_encoder: bool = False
    crop_scale: tuple[float, float] = (0.35, 1.0)
    hflip: float = 0.5
    vflip: float = 0.5
    color_jitter: float = 0.2
    auto_augment: str | None = None
    random_erasing: float = 0.0

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        **TrainConfig.RANGES,
        "val_fraction": (1e-6, 0.999),
        "split_seed": (0, 2**63 - 1),
        "validate_every": (1, INFINITE),
        "train_fraction": (1e-9, 1),
        "layer_decay": (0.01, 1),
        "label_smoothing": (0, 0.99),
        "mixup": (0, INFINITE),
        "cutmix": (0, INFINITE),
        "hflip": (0, 1),
        "vflip": (0, 1),
        "color_jitter": (0, 1),
        "random_erasing": (0, 1),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale is {list(self.crop_scale)}, expected the smallest and the largest share of a tile's area, "
                "such as [0.35, 1.0]"
            )
