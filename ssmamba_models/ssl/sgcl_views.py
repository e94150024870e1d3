"""The views of SGCL: a tile as a whole, and a crop of each of its corners."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import functional

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class SpatialGuidedMultiCrop:
    """Draw a global view of a tile and one crop in each of its four corners.

    The corners are the tile's quadrants. Each view is a random resized crop of the tile or of its quadrant, grey at
    random, with random brightness, contrast, saturation and hue, mirrored at random.

    Args:
        img_size: S, side of the global view in pixels.
        crop_size: s, side of a corner's crop; None takes 96 of 224, in multiples of 16 and at least 32.
        inner: draw the crops; without the inner invariance they are not needed.
        area: smallest and largest share of the tile's area that the global view shows.
        crop_area: of the quadrant's area that a crop shows.
        gray: chance of a grey view.
        jitter: brightness, contrast and saturation change by factors of 1 - jitter to 1 + jitter, the hue by as large
            a part of the circle, so at most 0.5; 0 leaves colours as they are.
        mean, std: per channel, for images in 0..1.

    Call: a PIL image and a torch.Generator -> dict of
        image: (3, S, S) float32, normalised.
        crops: (4, 3, s, s) float32, likewise: top left, top right, bottom left, bottom right.

    The generator alone decides: the same seed gives the same views.

    Raises:
        ValueError: an argument out of its range, named; or, when called, a tile of less than 2 x 2 px.

    Source: SGCL (Lin et al., Medical Image Analysis 89, 102845, 2023), inner-invariance.
    """

    def __init__(
        self,
        img_size: int,
        crop_size: int | None = None,
        inner: bool = True,
        area: Sequence[float] = (0.2, 1.0),
        crop_area: Sequence[float] = (0.2, 0.56),
        gray: float = 0.2,
        jitter: float = 0.4,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        for name, pair in (("area", area), ("crop_area", crop_area)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= 1:
                raise ValueError(f"{name} is {tuple(pair)}, expected (smallest, largest) above 0 and at most 1")
        for name, value, most in (("gray", gray, 1.0), ("jitter", jitter, 0.5)):
            if not 0 <= value <= most:
                raise ValueError(f"{name} is {value}, expected 0 to {most:g}")
        crop_size = max(32, round(img_size * 96 / 224 / 16) * 16) if crop_size is None else crop_size
        for name, value in (("img_size", img_size), ("crop_size", crop_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1 px")
        self.img_size, self.crop_size, self.inner = img_size, crop_size, inner
        self.area, self.crop_area, self.gray, self.jitter = tuple(area), tuple(crop_area), gray, jitter
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Image.Image, generator: torch.Generator) -> dict[str, Tensor]:
        width, height = image.size
        if min(width, height) < 2:
            raise ValueError(f"a tile of {width} x {height} px has no four corners")
        views = {"image": self._view(image, self.area, self.img_size, generator)}
        if self.inner:
            # Cut out first: resizing a part of an image looks a little beyond it.
            corners = [image.crop(corner) for corner in _corners(width, height)]
            crops = [self._view(corner, self.crop_area, self.crop_size, generator) for corner in corners]
            views["crops"] = torch.stack(crops)
        return views

    def _view(self, image: Image.Image, area: Sequence[float], size: int, generator: torch.Generator) -> Tensor:
        share, aspect, left, top, gray, flip, *colors = torch.rand(10, generator=generator).tolist()
        box = _crop(image.size, area[0] + share * (area[1] - area[0]), aspect, left, top)
        view = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if gray < self.gray:
            view = functional.to_grayscale(view, num_output_channels=3)
        view = self._color(view, colors)
        tensor = torch.from_numpy(np.array(view)).permute(2, 0, 1)
        tensor = tensor.flip(2) if flip < 0.5 else tensor
        return ((tensor / 255.0 - self.mean) / self.std).contiguous()

    def _color(self, view: Image.Image, draws: list[float]) -> Image.Image:
        if self.jitter == 0:
            return view
        brightness, contrast, saturation, hue = (self.jitter * (2 * draw - 1) for draw in draws)
        view = functional.adjust_brightness(view, 1 + brightness)
        view = functional.adjust_contrast(view, 1 + contrast)
        view = functional.adjust_saturation(view, 1 + saturation)
        return functional.adjust_hue(view, hue)


def _corners(width: int, height: int) -> list[tuple[int, int, int, int]]:
    x, y = width // 2, height // 2
    return [(0, 0, x, y), (width - x, 0, width, y), (0, height - y, x, height), (width - x, height - y, width, height)]


def _crop(size: tuple[int, int], share: float, aspect: float, left: float, top: float) -> Box:
    """A random crop of a share of an image's area, from 3 : 4 to 4 : 3 but within the image."""
    width, height = size
    ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
    across = min(width, math.sqrt(share * width * height * ratio))
    down = min(height, math.sqrt(share * width * height / ratio))
    x, y = left * (width - across), top * (height - down)
    # Rounding may leave the box a hair outside the image, which Pillow refuses.
    return (x, y, min(x + across, width), min(y + down, height))
