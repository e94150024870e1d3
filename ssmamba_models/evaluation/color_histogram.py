"""Colour histograms as an encoder: the baseline that any encoder of stained tissue must beat."""

from __future__ import annotations

import torch
from timm.data import create_transform
from torch import nn

from ssmamba_models.engine.encoder import Encoder

COLOR_HISTOGRAM = "color_histogram"
_SIZE = 224


class ColorHistogram(nn.Module):
    """Histograms of red, green, blue, hue, saturation and value, each channel by itself.

    What stain and staining alone tell of a tile: no shape, no texture. An entry is the share of a tile's pixels in a
    bin. On a data set whose classes were stained or scanned apart this goes far, and that is what it is here to show.

    Args:
        bins: bins per channel.
    """

    def __init__(self, bins: int = 16):
        super().__init__()
        self.bins = bins

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) RGB in 0..1 -> (B, 6 * bins)."""
        channels = torch.cat((images, rgb_to_hsv(images)), dim=1).flatten(2)
        batch, count, pixels = channels.shape
        bin_of = (channels * self.bins).long().clamp(0, self.bins - 1)
        first_bin = torch.arange(batch * count, device=images.device).view(batch, count, 1) * self.bins
        counts = torch.bincount((bin_of + first_bin).flatten(), minlength=batch * count * self.bins)
        return counts.view(batch, count * self.bins) / pixels


def rgb_to_hsv(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) RGB in 0..1 -> hue (as a share of the circle), saturation and value in 0..1, same shape.

    Source: A. R. Smith, "Color gamut transform pairs", SIGGRAPH 1978. Grey has hue 0, black saturation 0.
    """
    red, green, blue = images.unbind(dim=1)
    value, _ = images.max(dim=1)
    chroma = value - images.amin(dim=1)
    width = chroma.clamp_min(1e-12)
    hue = torch.where(
        value == red,
        (green - blue) / width % 6,
        torch.where(value == green, (blue - red) / width + 2, (red - green) / width + 4),
    )
    return torch.stack((hue / 6, chroma / value.clamp_min(1e-12), value), dim=1)


def color_histogram_encoder(img_size: int | None = None) -> Encoder:
    """The baseline as `load_encoder` would return it.

    Args:
        img_size: side of the square that tiles are resized to; None: 224 px.

    Returns:
        An encoder of 96 features, without weights, on the CPU.
    """
    config = {
        "input_size": (3, img_size or _SIZE, img_size or _SIZE),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    network = ColorHistogram().eval()
    return Encoder(
        model=network,
        runner=network,
        name=COLOR_HISTOGRAM,
        embed_dim=6 * network.bins,
        transform=create_transform(**config, is_training=False),
        data_config=config,
        device=torch.device("cpu"),
        dtype="float32",
        weights={"weights": "none", "pretrained_tag": "none"},
    )
