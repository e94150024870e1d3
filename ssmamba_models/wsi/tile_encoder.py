"""From tiles as pixels to features: the model's own normalisation, on its device, and nothing else.

A tile goes into the model whole. The transform of evaluation crops many models' input (crop_pct 0.9, say), which on a
slide would drop a tile's border and change the magnification; here it is resized, if at all, and not cropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ssmamba_models.choices import POOLS
from ssmamba_models.engine.encoder import Encoder
from ssmamba_models.engine.feature_pool import last_maps, pool_features, pool_maps
from ssmamba_models.engine.short_memory import out_of_memory
from ssmamba_models.wsi.shared_aug import SharedAugmentation


class TileEncoder:
    """An encoder that takes tiles as they are read.

    Args:
        encoder: the model.
        grid: whether to keep the token maps.

    Attributes:
        size: side of the model's input, px.
        interpolation: how tiles of another size are resized.
        grid_shape: (h, w, C) of the token maps, or None.

    Raises:
        ValueError: the model takes no square RGB input, is told to resize in a way that Pillow does not know, or has no
            token maps.
    """

    def __init__(self, encoder: Encoder, grid: bool = False):
        self.encoder = encoder
        self.size = _side(encoder)
        self.interpolation = _interpolation(encoder)
        self._mean, self._std = (
            torch.tensor(encoder.data_config[key], device=encoder.device).view(1, 3, 1, 1) for key in ("mean", "std")
        )
        self._grid = grid
        self.grid_shape: tuple[int, ...] | None = None
        if grid:
            blank = self.start(torch.zeros(1, self.size, self.size, 3, dtype=torch.uint8))
            self.grid_shape = tuple(blank[1].shape[1:])

    def provenance(self) -> dict[str, Any]:
        """As `Encoder.provenance`, with what is done to tiles of a slide."""
        return {**self.encoder.provenance(), "crop_pct": 1.0, "interpolation": self.interpolation}

    def start(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Begin to compute features; a GPU goes on while the next tiles are gathered.

        Args:
            pixels: (B, size, size, 3) uint8, on the CPU; page-locked where the device is a GPU.

        Returns:
            Features (B, D) and token maps (B, h, w, C) or None, on the device.

        Raises:
            ValueError: the batch does not fit into the device's memory.
        """
        return self._start(pixels, None)

    def start_augmented(
        self, pixels: torch.Tensor, augmentation: SharedAugmentation
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `start`, for tiles of a bag, all of which are altered in the same way; without token maps."""
        return self._start(pixels, augmentation)

    @torch.inference_mode()
    def _start(
        self, pixels: torch.Tensor, augmentation: SharedAugmentation | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        device = self.encoder.device
        try:
            # Rows of pixels with their colours side by side are what torch calls channels-last.
            images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
            if augmentation is not None:
                images = augmentation(images)
            images = images.sub_(self._mean).div_(self._std)
            return self._forward(images, maps=self._grid and augmentation is None)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise ValueError(
                f"a batch of {len(pixels)} tiles does not fit into the memory of {device}; use a smaller --batch-size"
            ) from error

    def _forward(self, images: torch.Tensor, maps: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        model = self.encoder.runner
        pool = self.encoder.pool
        if not maps:
            return pool_features(model, images, pool), None
        last, maps = last_maps(model, images, POOLS[pool], "leave --grid out")
        if maps[-1].ndim != 4:
            raise ValueError(f"{self.encoder.name} returns no two-dimensional maps; leave --grid out")
        return pool_maps(model, last, maps, pool), maps[-1].permute(0, 2, 3, 1)

    @staticmethod
    def finish(started: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[np.ndarray, np.ndarray | None]:
        """Wait for what `start` began; float32 arrays."""
        features, grid = started
        return features.float().cpu().numpy(), None if grid is None else grid.float().cpu().numpy()


def _side(encoder: Encoder) -> int:
    channels, height, width = encoder.data_config["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"{encoder.name} takes {channels} x {height} x {width}; tiles of slides are square RGB")
    return height


def _interpolation(encoder: Encoder) -> str:
    name = encoder.data_config["interpolation"]
    # "random" is for training.
    name = "bicubic" if name == "random" else name
    if name.upper() not in Image.Resampling.__members__:
        raise ValueError(f"{encoder.name} wants its input resized by {name!r}, which Pillow does not know")
    return name
