"""What every slide encoder is: the tiles of a slide in, one vector out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SlideEncoder(nn.Module):
    """Base of the models that turn the tiles of a slide into a vector.

    Subclasses implement `encode` (a batch of slides) and `embed_slide` (one whole slide, in bounded memory).

    Args:
        feature_dim: D, the length of a tile's feature.
        embed_dim: E, the length of a slide's vector.

    Attributes:
        feature_dim, embed_dim: D and E.
        name, arguments: what `create_slide_encoder` made it from ("" and {} where that did not), for saving.

    Shape: features (B, N, D), float; grid (B, N, 2) float, (x, y) of each tile in tiles, `coords / patch_size_level0`,
    at any offset, may be fractional; mask (B, N) bool, False at padding, or None -> (B, E). Padding and what stands in
    it change nothing.

    Raises:
        ValueError: an argument or shape that does not fit, or a slide without a tile.
        TypeError: a mask that is not bool.
    """

    def __init__(self, feature_dim: int, embed_dim: int) -> None:
        super().__init__()
        for name, value in (("feature_dim", feature_dim), ("embed_dim", embed_dim)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        self.feature_dim, self.embed_dim = feature_dim, embed_dim
        self.name = ""
        self.arguments: dict[str, Any] = {}

    def forward(self, features: Tensor, grid: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """The vectors of a batch of slides (see the class); `options` go to `encode`."""
        self.check(features, grid, mask)
        if mask is not None:
            # 0 times what stands in the padding could still be NaN.
            features, grid = (values.masked_fill(~mask[..., None], 0) for values in (features, grid))
        return self.encode(features, grid, mask, **options)

    def encode(self, features: Tensor, grid: Tensor, mask: Tensor | None) -> Tensor:
        """What `forward` gives, for inputs that are checked and whose padding is 0."""
        raise NotImplementedError

    @torch.inference_mode()
    def embed(self, features: Tensor, grid: Tensor, *, seed: int = 0, **options: Any) -> Tensor:
        """The vector of one whole slide, of any size, as it is used downstream: in eval mode, the same for a seed.

        Args:
            features: (N, D), float32 or float16, on any device: what is needed of them is moved.
            grid: (N, 2) as in `forward`.
            seed: of what is drawn.
            options: of the encoder, see its `embed_slide`.

        Returns:
            (E,) float32, on the encoder's device.

        Raises:
            ValueError: as `forward`, or an option that cannot be.
        """
        self.check(features[None], grid[None], None)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return self.embed_slide(features, grid, torch.Generator().manual_seed(seed), **options).float()
        finally:
            for module, training in modes:
                module.training = training

    def embed_slide(self, features: Tensor, grid: Tensor, generator: torch.Generator) -> Tensor:
        """What `embed` gives, for inputs that are checked; draws from the generator (of the CPU) alone."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def check(self, features: Tensor, grid: Tensor | None, mask: Tensor | None) -> None:
        """Make sure that inputs of `forward` fit.

        Raises:
            ValueError, TypeError: see the class.
        """
        name, width = self.name or type(self).__name__, self.feature_dim
        if features.dim() != 3 or features.shape[2] != width:
            raise ValueError(f"{name}: features have shape {tuple(features.shape)}, expected (B, N, {width})")
        if grid is None:
            raise ValueError(f"{name} needs where the tiles lie: grid (B, N, 2), coords / patch_size_level0")
        tiles = tuple(features.shape[:2])
        if tuple(grid.shape) != (*tiles, 2):
            raise ValueError(f"{name}: grid has shape {tuple(grid.shape)}, expected (B, N, 2) = {(*tiles, 2)}")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"{name}: mask must be a bool tensor, not {mask.dtype}; compare or cast it with .bool()")
        if mask is not None and tuple(mask.shape) != tiles:
            raise ValueError(f"{name}: mask has shape {tuple(mask.shape)}, expected (B, N) = {tiles}")
        if tiles[1] == 0 or (mask is not None and not mask.any(dim=1).all()):
            raise ValueError(f"{name}: a slide without tiles; leave such slides out")
