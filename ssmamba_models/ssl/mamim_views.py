"""The views of MAMIM: a tile at two magnifications, one nested in the other, with a mask for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ssmamba_models.ssl.stain_jitter import StainJitter

Box = tuple[float, float, float]  # left, top and side of a square, in pixels of the tile


class MamimViews:
    """Draw a low and a high magnification view of a tile, their masks, and where the high lies in the low.

    The low view is a square of the tile, the high view a square inside it; both are resized to the same input size,
    so the high view shows its tissue at `zoom` times the magnification. Each is turned and mirrored at random (one of
    the eight symmetries of the square), and each has a random mask of square cells of its own.

    Args:
        img_size: S, side of both views in pixels; a multiple of `cell_size`.
        cell_size: side of a masked cell in pixels.
        mask_ratio: share of the cells that is masked, in (0, 1).
        area: smallest and largest share of the tile's area that the low view shows.
        zoom: smallest and largest magnification of the high view over the low view; drawn log-uniformly.
        max_upsampling: the high view's pixels are at most this many times smaller than the tile's own: the zoom is
            cut where a tile is too small for it.
        stain, jitter, gray: random stain and colour of each view, drawn anew for each; see `StainJitter`. At 0 colours
            stay as they are.
        local_crops: number of local views: small squares of the low view's part of the tile, without masks.
        local_size: side of a local view in pixels.
        local_area: smallest and largest share of the low view's area that a local view shows.
        mean, std: per channel, for images in 0..1.

    Call: a PIL image and a torch.Generator -> dict of
        low, high: (3, S, S) float32, normalised.
        low_mask, high_mask: (S / cell_size, S / cell_size) bool, True where masked; every mask has as many.
        theta: (2, 3) float32: maps a point (x, y) of the high view to the low view, in `affine_grid`'s coordinates
            (-1 to 1, align_corners=False).
        local: (local_crops, 3, local_size, local_size) float32, normalised; only where local_crops is not 0.

    The generator alone decides: the same seed gives the same views.

    Raises:
        ValueError: an argument out of its range, named.

    Source: SSMamba (arXiv:2604.15711), MAMIM, as this project reads it; local views: DINO (arXiv:2104.14294, sec. 3.1).
    """

    def __init__(
        self,
        img_size: int,
        cell_size: int = 32,
        mask_ratio: float = 0.5,
        area: Sequence[float] = (0.5, 1.0),
        zoom: Sequence[float] = (1.25, 2.5),
        max_upsampling: float = 2.0,
        stain: float = 0.0,
        jitter: float = 0.0,
        gray: float = 0.0,
        local_crops: int = 0,
        local_size: int = 64,
        local_area: Sequence[float] = (0.1, 0.4),
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        _check_range("area", area, 0.0, 1.0)
        _check_range("zoom", zoom, 1.0, math.inf)
        _check_range("local_area", local_area, 0.0, 1.0)
        if local_crops < 0 or local_size < 1:
            raise ValueError(f"local_crops is {local_crops} and local_size is {local_size}, expected at least 0 and 1")
        if not max_upsampling >= 1:
            raise ValueError(f"max_upsampling is {max_upsampling}, expected 1 (never enlarge) or more")
        if cell_size < 1 or img_size < cell_size or img_size % cell_size:
            raise ValueError(
                f"img_size is {img_size}, expected a multiple of cell_size, which is {cell_size} "
                f"(the nearest: {max(1, round(img_size / max(cell_size, 1))) * cell_size})"
            )
        self.img_size, self.side = img_size, img_size // cell_size
        self.masked = round(mask_ratio * self.side**2)
        if not 0 < mask_ratio < 1 or not 0 < self.masked < self.side**2:
            raise ValueError(
                f"mask_ratio is {mask_ratio}, which masks {self.masked} of {self.side**2} cells; expected at least one "
                "masked and one visible: choose a ratio between 0 and 1, or smaller cells (cell_size)"
            )
        self.area, self.zoom, self.max_upsampling = tuple(area), tuple(zoom), max_upsampling
        self.colors = StainJitter(stain, jitter, gray)
        self.local_crops, self.local_size, self.local_area = local_crops, local_size, tuple(local_area)
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Image.Image, generator: torch.Generator) -> dict[str, Tensor]:
        low, high = self._boxes(image.size, generator)
        turn_low, turn_high = (_random_turn(generator) for _ in range(2))
        low_mask, high_mask = (self._mask(generator) for _ in range(2))
        views = {
            "low": self._view(image, low, turn_low, self.img_size, generator),
            "high": self._view(image, high, turn_high, self.img_size, generator),
            "low_mask": low_mask,
            "high_mask": high_mask,
            "theta": _window(low, high, turn_low, turn_high),
        }
        if self.local_crops:
            views["local"] = torch.stack([self._local(image, low, generator) for _ in range(self.local_crops)])
        return views

    def _boxes(self, size: tuple[int, int], generator: torch.Generator) -> tuple[Box, Box]:
        share, zoom, *places = torch.rand(6, generator=generator).tolist()
        area = self.area[0] + share * (self.area[1] - self.area[0])
        # Square, so that nuclei keep their shape whatever the tile's.
        side = min(math.sqrt(area * size[0] * size[1]), *size)
        low = (places[0] * (size[0] - side), places[1] * (size[1] - side), side)
        zoom = math.exp(math.log(self.zoom[0]) + zoom * math.log(self.zoom[1] / self.zoom[0]))
        # At the cap the high view may show all of the low view, but not more.
        inner = min(side, max(side / zoom, self.img_size / self.max_upsampling))
        high = (low[0] + places[2] * (side - inner), low[1] + places[3] * (side - inner), inner)
        return low, high

    def _local(self, image: Image.Image, low: Box, generator: torch.Generator) -> Tensor:
        share, *places = torch.rand(3, generator=generator).tolist()
        side = low[2] * math.sqrt(self.local_area[0] + share * (self.local_area[1] - self.local_area[0]))
        box = (low[0] + places[0] * (low[2] - side), low[1] + places[1] * (low[2] - side), side)
        return self._view(image, box, _random_turn(generator), self.local_size, generator)

    def _view(
        self, image: Image.Image, box: Box, turn: tuple[bool, bool, bool], size: int, generator: torch.Generator
    ) -> Tensor:
        left, top, side = box
        # Rounding may leave the box a hair outside the image, which Pillow refuses.
        edges = (max(0.0, left), max(0.0, top), min(image.width, left + side), min(image.height, top + side))
        pixels = image.resize((size, size), Image.Resampling.BICUBIC, box=edges)
        tensor = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        transpose, flip_x, flip_y = turn
        if transpose:
            tensor = tensor.transpose(1, 2)
        flips = [axis for axis, flip in ((2, flip_x), (1, flip_y)) if flip]
        tensor = tensor.flip(flips) if flips else tensor
        return ((self.colors(tensor / 255.0, generator) - self.mean) / self.std).contiguous()

    def _mask(self, generator: torch.Generator) -> Tensor:
        mask = torch.zeros(self.side**2, dtype=torch.bool)
        mask[torch.randperm(self.side**2, generator=generator)[: self.masked]] = True
        return mask.view(self.side, self.side)


def _check_range(name: str, pair: Sequence[float], least: float, most: float) -> None:
    if len(pair) != 2 or not least < pair[1] <= most or not max(least, 1e-9) <= pair[0] <= pair[1]:
        raise ValueError(f"{name} is {tuple(pair)}, expected (smallest, largest) between {least:g} and {most:g}")


def _random_turn(generator: torch.Generator) -> tuple[bool, bool, bool]:
    """One of the eight symmetries of the square: transposed, then flipped in x, then in y."""
    transpose, flip_x, flip_y = (torch.rand(3, generator=generator) < 0.5).tolist()
    return transpose, flip_x, flip_y


def _turn_matrix(turn: tuple[bool, bool, bool]) -> np.ndarray:
    """M: the turned view shows at p what the square before it shows at M p."""
    transpose, flip_x, flip_y = turn
    flips = np.diag([-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0])
    return np.array([[0.0, 1.0], [1.0, 0.0]]) @ flips if transpose else flips


def _window(low: Box, high: Box, turn_low: tuple[bool, bool, bool], turn_high: tuple[bool, bool, bool]) -> Tensor:
    scale = high[2] / low[2]
    centre = np.array([2 * (high[axis] - low[axis]) / low[2] + scale - 1 for axis in (0, 1)])
    # A turn's matrix is orthogonal: its inverse is its transpose.
    back, forth = _turn_matrix(turn_low).T, _turn_matrix(turn_high)
    return torch.tensor(np.column_stack([scale * back @ forth, back @ centre]), dtype=torch.float32)
