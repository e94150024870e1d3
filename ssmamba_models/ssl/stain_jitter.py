"""Random stain and colour of a tile, so that an encoder has to rely on structure."""

from __future__ import annotations

import torch
from torch import Tensor

# Optical density of haematoxylin, eosin and a residual stain in red, green and blue (Ruifrok and Johnston, 2001).
_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
_LUMA = (0.299, 0.587, 0.114)
_SHIFT = 0.2  # of a stain's density, as a part of its scale's range
_DARKEST = 1.0 / 255


class StainJitter:
    """Scale and shift the stains of a tile at random, then its brightness, contrast and saturation, or make it grey.

    With c = -ln(rgb) S^-1 the densities of haematoxylin, eosin and a residual at a pixel (S: rows of unit length)::

        rgb' = exp(-(a * c + b) S),   a ~ U(1 - stain, 1 + stain),   b ~ U(-stain, stain) / 5

    one a and b for each stain of an image. Then, with factors from U(1 - jitter, 1 + jitter), brightness multiplies all
    values, contrast their distance from the image's mean grey, saturation the distance from each pixel's grey.

    Args:
        stain: range of the stains' scale and shift, in [0, 1); 0 leaves stains as they are.
        jitter: range of brightness, contrast and saturation, in [0, 1); 0 leaves them as they are.
        gray: probability of a grey image, in [0, 1].

    Call: (3, H, W) float in 0..1 and a torch.Generator -> the same shape and range. Where an argument is 0 nothing is
        drawn for it.

    Raises:
        ValueError: an argument out of its range, named.

    Example:
        >>> jitter = StainJitter(stain=0.2, gray=0.1)
        >>> jitter(torch.rand(3, 64, 64), torch.Generator().manual_seed(0)).shape
        torch.Size([3, 64, 64])

    Source: stain densities: Ruifrok and Johnston, "Quantification of histochemical staining by color deconvolution",
    2001; their perturbation: Tellez et al., "Whole-slide mitosis detection in H&E breast histology", IEEE TMI 2018.
    """

    def __init__(self, stain: float = 0.0, jitter: float = 0.0, gray: float = 0.0) -> None:
        for name, value in (("stain", stain), ("jitter", jitter)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected 0 or more and less than 1")
        if not 0 <= gray <= 1:
            raise ValueError(f"gray is {gray}, expected a probability between 0 and 1")
        self.stain, self.jitter, self.gray = stain, jitter, gray
        stains = torch.tensor(_STAINS)
        self.stains = stains / stains.norm(dim=1, keepdim=True)
        self.inverse = torch.linalg.inv(self.stains)

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        if self.stain > 0:
            pixels = self._restain(pixels, generator)
        if self.jitter > 0:
            pixels = self._recolor(pixels, generator)
        if self.gray > 0 and float(torch.rand((), generator=generator)) < self.gray:
            pixels = _gray(pixels).expand(3, -1, -1)
        return pixels

    def _restain(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        scale, shift = self.stain * (2 * torch.rand(2, 3, generator=generator) - 1)
        # Both steps of the equation in one product: an affine map of optical density.
        matrix = self.inverse @ torch.diag(1 + scale) @ self.stains
        density = -pixels.clamp_min(_DARKEST).log()
        changed = torch.einsum("chw,cd->dhw", density, matrix) + ((_SHIFT * shift) @ self.stains)[:, None, None]
        return (-changed).exp().clamp(0, 1)

    def _recolor(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        factors = 1 + self.jitter * (2 * torch.rand(3, generator=generator) - 1)
        brightness, contrast, saturation = factors.tolist()
        pixels = (pixels * brightness).clamp(0, 1)
        mean = _gray(pixels).mean()
        pixels = ((pixels - mean) * contrast + mean).clamp(0, 1)
        gray = _gray(pixels)
        return ((pixels - gray) * saturation + gray).clamp(0, 1)


def _gray(pixels: Tensor) -> Tensor:
    """(3, H, W) -> (1, H, W)."""
    return torch.einsum("chw,c->hw", pixels, torch.tensor(_LUMA))[None]
