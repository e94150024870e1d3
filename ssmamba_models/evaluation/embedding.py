"""The features of every encoder and seed, kept in files of the report's folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ssmamba_models.data.tiles import TileFolder
from ssmamba_models.engine.encoder import Encoder, RandomWeightsWarning
from ssmamba_models.evaluation.model_choice import ModelChoice
from ssmamba_models.evaluation.tile_features import FeatureTable, tile_features


@dataclass(frozen=True)
class Embedding:
    """How features are computed.

    Attributes:
        img_size, device, precision, pool: as `load_encoder`.
        batch_size, workers: as `embed_folder`.
        threads: CPU threads of the whole evaluation; None takes the cores that this process may use (see
            `threads.use_threads`).
        progress: draw progress bars on stderr.
    """

    img_size: int | None = None
    batch_size: int = 32
    workers: int | None = None
    threads: int | None = None
    device: str | torch.device | None = None
    precision: str = "fp32"
    pool: str = "model"
    progress: bool = True

    def load(self, choice: ModelChoice, seed: int = 0, img_size: int | None = None) -> Encoder:
        """Make an encoder; random weights are what was asked for, so there is no warning of them.

        Raises:
            ValueError, OSError: as `load_encoder`.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RandomWeightsWarning)
            return choice.load(seed, img_size or self.img_size, self.device, self.precision, self.pool)

    def tables(
        self,
        tiles: TileFolder,
        choice: ModelChoice,
        seeds: int,
        folder: Path,
        suffix: str = "",
        img_size: int | None = None,
    ) -> list[FeatureTable]:
        """One table of features per seed; weights that do not vary give the same table for all.

        Args:
            tiles: the tiles.
            choice: the encoder.
            seeds: number of tables.
            folder: where the files are kept; it exists.
            suffix: what the files' names have after the label.
            img_size: side of the input instead of the usual one.

        Raises:
            ValueError, OSError, ImportError: as `tile_features`.
        """
        stem = f"{choice.label}{suffix}"
        names = [f"{stem}.seed{seed}.h5" for seed in range(seeds)] if choice.varies else [f"{stem}.h5"]
        tables = [
            tile_features(
                tiles,
                self.load(choice, seed, img_size),
                folder / name,
                batch_size=self.batch_size,
                workers=self.workers,
                progress=self.progress,
            )
            for seed, name in enumerate(names)
        ]
        return tables if choice.varies else tables * seeds


def shared_places(tables: Sequence[Sequence[FeatureTable]]) -> np.ndarray:
    """Places of the tiles that every encoder could read, rising."""
    shared = tables[0][0].places
    for table in (table for seeds in tables for table in seeds):
        shared = np.intersect1d(shared, table.places)
    return shared
