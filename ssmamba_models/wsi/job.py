"""The folder of a job of extraction: where everything lies, and what its features are made with."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmamba_models.data.features import open_slide_features
from ssmamba_models.wsi.job_folder import PART, FolderSettings, JobFolder, remove_matching
from ssmamba_models.wsi.slide_list import SlideFile

# Raised when the same settings begin to give other features.
FORMAT = 1

_OURS = re.compile(r"thumbnails|contours|[0-9.e+-]+mpp_\d+px_\d+px")


@dataclass(frozen=True)
class JobSettings(FolderSettings):
    """All that decides what a job's features are. One job has one of these; its files tell its hash.

    Attributes:
        model, weights_sha256, embed_dim: the encoder.
        input_size, mean, std, interpolation, precision: how it is given a tile, and computes.
        mpp, tile_size, overlap, min_tissue: the tiles, as `wsi.grid.make_grid`.
        dtype: of the stored features.
        grid: whether token maps are stored.
        pool: how a map becomes a vector (see `engine.feature_pool`).
        shared_aug, shared_aug_tiles, shared_aug_seed: bags of shared augmentation per slide, tiles of each, seed of
            both; 0 for none.
        format: `FORMAT`.
    """

    model: str
    weights_sha256: str
    embed_dim: int
    input_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    precision: str
    mpp: float
    tile_size: int
    overlap: int
    min_tissue: float
    dtype: str
    grid: bool
    pool: str = "model"
    shared_aug: int = 0
    shared_aug_tiles: int = 0
    shared_aug_seed: int = 0
    format: int = FORMAT

    def values(self) -> dict[str, Any]:
        """As YAML and JSON have them.

        Without bags nothing of bags, without another pool nothing of pools: jobs from before there were any go on.
        """
        left_out = set() if self.shared_aug else {"shared_aug", "shared_aug_tiles", "shared_aug_seed"}
        left_out |= {"pool"} if self.pool == "model" else set()
        return {key: value for key, value in super().values().items() if key not in left_out}


class Job(JobFolder[JobSettings]):
    """An open job of extraction (see `JobFolder`).

    Attributes:
        thumbnails, contours, features: folders of outputs.
    """

    outputs = "features"

    def __init__(self, root: str | os.PathLike, settings: JobSettings):
        super().__init__(root, settings)
        self.thumbnails, self.contours = self.root / "thumbnails", self.root / "contours"
        tiles = f"{settings.mpp:g}mpp_{settings.tile_size}px_{settings.overlap}px"
        self.features = self.root / tiles / f"features_{_folder_name(settings.model)}"

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that files are written in."""
        return self.root, self.thumbnails, self.contours, self.features

    def feature_file(self, slide: SlideFile) -> Path:
        """Where a slide's features go."""
        return self.features / f"{slide.name}.h5"

    def _check_contents(self) -> None:
        if any(self.features.parent.glob("*/*.h5")):
            raise FileExistsError(f"{str(self.root)!r} holds feature files, but no config.yaml; choose another --out")
        super()._check_contents()

    def _is_ours(self, name: str) -> bool:
        return _OURS.fullmatch(name) is not None

    def clean_slide(self, slide: SlideFile) -> None:
        """As `JobFolder.clean_slide`: part files."""
        part = re.compile(PART.format(stem=re.escape(slide.name)))
        for folder in (self.thumbnails, self.contours, self.features):
            remove_matching(folder, part)

    def discard_obsolete(self, slide: SlideFile) -> None:
        """As `JobFolder.discard_obsolete`: a feature file of another slide file, or of other settings."""
        path = self.feature_file(slide)
        try:
            # A slide that is out of reach for now is no other slide.
            size = os.path.getsize(slide.path)
            with open_slide_features(path) as file:
                attributes = file.attributes
        except (ValueError, OSError):
            return
        if (attributes.get("configuration_hash"), attributes.get("slide_bytes")) != (self.settings.hash, size):
            path.unlink(missing_ok=True)

    def find_done(self, slide: SlideFile) -> dict[str, Any] | None:
        """As `JobFolder.find_done`: the feature file opens, and is of this job and of this slide."""
        path = self.feature_file(slide)
        if not path.exists():
            return None
        try:
            with open_slide_features(path) as file:
                attributes, geometry, tiles = file.attributes, file.coords_attributes, len(file)
        except (ValueError, OSError):
            return None
        if attributes.get("configuration_hash") != self.settings.hash or attributes["slide_bytes"] != slide.bytes:
            return None
        self._check_mpp(slide, path, geometry["level0_mpp"], "extracted")
        facts = {key: attributes[key] for key in ("tissue_share", "mpp_source", "mpp_error")}
        return {
            "tiles": tiles,
            "mpp": geometry["level0_mpp"],
            **facts,
            "bad_tiles": attributes["tiles_in_grid"] - tiles,
        }


def _folder_name(model: str) -> str:
    # "hf-hub:ORG/NAME" is a model, and no name of a folder.
    return re.sub(r"[^A-Za-z0-9._-]+", "_", model)
