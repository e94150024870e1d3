"""What a job of extraction is told, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ssmamba_models.choices import ENCODER_PRECISIONS, ENGINES, FEATURE_DTYPES, POOLS
from ssmamba_models.engine.encoder import Encoder, load_encoder
from ssmamba_models.wsi.job import JobSettings
from ssmamba_models.wsi.tile_encoder import TileEncoder
from ssmamba_models.wsi.tiling_plan import TilingPlan

_OF_RAY = ("num_cpus", "num_gpus", "max_retries")


@dataclass(frozen=True)
class ExtractPlan(TilingPlan):
    """How to extract: as `TilingPlan`, and more.

    Where the model takes another size than `tile_size`, tiles are resized.

    Attributes:
        model, pretrained, checkpoint, device, precision, img_size, seed, pool: as `engine.encoder.load_encoder`.
        dtype: "float32" or "float16", of the stored features.
        grid: store the token map of each tile as well.
        shared_aug: bags of shared augmentation that each slide gets beside its features; drawn from `seed` as well.
        shared_aug_tiles: tiles of a bag.
        batch_size: tiles per forward pass.
        engine: "local", or "ray": a task for each slide on a Ray cluster.
        num_cpus, num_gpus, max_retries: of each Ray task.
    """

    model: str = "ssmamba_small"
    pretrained: bool = False
    checkpoint: str | None = None
    device: str | None = None
    precision: str = "fp32"
    img_size: int | None = None
    seed: int = 0
    pool: str = "model"
    dtype: str = "float32"
    grid: bool = False
    shared_aug: int = 0
    shared_aug_tiles: int = 256
    batch_size: int = 32
    engine: str = "local"
    num_cpus: float = 2
    num_gpus: float = 0
    max_retries: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(batch_size=1, img_size=1, num_cpus=0, num_gpus=0, max_retries=0)
        self._check_least(shared_aug=0, shared_aug_tiles=1)
        choices = {"precision": ENCODER_PRECISIONS, "dtype": FEATURE_DTYPES, "engine": ENGINES, "pool": POOLS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in _OF_RAY:
            if self.engine != "ray" and getattr(self, name) != getattr(ExtractPlan, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but only Ray's tasks have it; add --engine ray")

    def load(self) -> TileEncoder:
        """The model (see `load_encoder`)."""
        encoder = load_encoder(
            self.model,
            pretrained=self.pretrained,
            checkpoint=self.checkpoint,
            device=self.device,
            precision=self.precision,
            img_size=self.img_size,
            seed=self.seed,
            pool=self.pool,
        )
        return TileEncoder(encoder, self.grid)

    def settings(self, encoder: TileEncoder, provenance: dict[str, Any]) -> JobSettings:
        """All that decides what the features are."""
        return JobSettings(
            model=self.model,
            weights_sha256=provenance["weights_sha256"],
            embed_dim=encoder.encoder.embed_dim,
            input_size=tuple(provenance["input_size"]),
            mean=tuple(provenance["mean"]),
            std=tuple(provenance["std"]),
            interpolation=provenance["interpolation"],
            precision=provenance["dtype"],
            mpp=float(self.mpp),
            tile_size=self.tile_size,
            overlap=self.overlap,
            min_tissue=float(self.min_tissue),
            pool=self.pool,
            dtype=self.dtype,
            grid=self.grid,
            shared_aug=self.shared_aug,
            shared_aug_tiles=self.shared_aug_tiles,
            shared_aug_seed=self.seed,
        )

    def begun_with(self, encoder: Encoder) -> dict[str, Any]:
        """What config.yaml tells besides: it changes no feature, or their last bits only."""
        names = ("pretrained", "checkpoint", "seed", "batch_size", "max_bad_tiles", "mpp_override", "mpp_csv")
        return {**{name: getattr(self, name) for name in names}, "device": str(encoder.device)}
