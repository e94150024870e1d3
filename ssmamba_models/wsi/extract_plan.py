"""What a job of extraction is told, checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ssmamba_models.engine.encoder import Encoder, load_encoder
from ssmamba_models.wsi.job import JobSettings
from ssmamba_models.wsi.mpp import check_mpp, read_mpp_csv
from ssmamba_models.wsi.slide_list import SlideFile, find_slides
from ssmamba_models.wsi.tile_encoder import TileEncoder

ENGINES, DTYPES = ("local", "ray"), ("float32", "float16")


@dataclass(frozen=True)
class ExtractPlan:
    """How to extract.

    Attributes:
        model, pretrained, checkpoint, device, bf16, img_size, seed: as `engine.encoder.load_encoder`.
        mpp: um per pixel of the tiles.
        tile_size: side of a tile, px at `mpp`; where the model takes another size, tiles are resized to that.
        overlap: px at `mpp` that neighbours share.
        min_tissue: the least share of a tile that must be tissue.
        mpp_override: um per level-0 pixel of all slides, instead of what they say.
        mpp_csv: a table (slide,mpp) of the same for single slides; goes before `mpp_override`.
        dtype: "float32" or "float16", of the stored features.
        grid: store the token map of each tile as well.
        shared_aug: bags of shared augmentation that each slide gets beside its features; drawn from `seed` as well.
        shared_aug_tiles: tiles of a bag.
        max_bad_tiles: the share of a slide's tiles that may be unreadable; a slide with more fails.
        retry_failed: try failed slides again.
        batch_size: tiles per forward pass.
        workers: processes that read tiles ahead; 0 reads in this one, None chooses by the machine.
        engine: "local", or "ray": a task for each slide on a Ray cluster.
        shard: (i, n): begin with the i-th share of the slides, from 1, then help the other shards.
        num_cpus, num_gpus, max_retries: of each Ray task.
    """

    model: str = "ssmamba_small"
    pretrained: bool = False
    checkpoint: str | None = None
    device: str | None = None
    bf16: bool = False
    img_size: int | None = None
    seed: int = 0
    mpp: float = 0.5
    tile_size: int = 224
    overlap: int = 0
    min_tissue: float = 0.25
    mpp_override: float | None = None
    mpp_csv: str | None = None
    dtype: str = "float32"
    grid: bool = False
    shared_aug: int = 0
    shared_aug_tiles: int = 256
    max_bad_tiles: float = 0.05
    retry_failed: bool = False
    batch_size: int = 32
    workers: int | None = None
    engine: str = "local"
    shard: tuple[int, int] | None = None
    num_cpus: float = 2
    num_gpus: float = 0
    max_retries: int = 3

    def __post_init__(self) -> None:
        check_mpp(self.mpp, "mpp")
        if self.mpp_override is not None:
            check_mpp(self.mpp_override, "mpp_override")
        if not 0 <= self.overlap < self.tile_size:
            raise ValueError(
                f"the overlap is {self.overlap} px and the tile size {self.tile_size} px; the overlap must be 0 or "
                "more and smaller than the tile size"
            )
        for name in ("min_tissue", "max_bad_tiles"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share from 0 to 1")
        least = {"batch_size": 1, "workers": 0, "img_size": 1, "num_cpus": 0, "num_gpus": 0, "max_retries": 0}
        least |= {"shared_aug": 0, "shared_aug_tiles": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not (value >= bound and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, expected {bound} or more")
        for name, known in (("dtype", DTYPES), ("engine", ENGINES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")

    def slides(self, places: Any) -> list[SlideFile]:
        """The slides of these files and folders (see `find_slides`)."""
        table = None if self.mpp_csv is None else read_mpp_csv(self.mpp_csv)
        return find_slides(places, self.mpp_override, table)

    def load(self) -> TileEncoder:
        """The model (see `load_encoder`)."""
        encoder = load_encoder(
            self.model,
            pretrained=self.pretrained,
            checkpoint=self.checkpoint,
            device=self.device,
            bf16=self.bf16,
            img_size=self.img_size,
            seed=self.seed,
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
