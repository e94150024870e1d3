"""The slide encoders of Giga-SSL: "scm", a sparse ResNet block over the tiles' grid, and "mlp", a mean over tiles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmamba_models.slide.batch_norm import RowBatchNorm
from ssmamba_models.slide.slide_encoder import SlideEncoder
from ssmamba_models.slide.sparse_conv import Pairs, SparseConv, around, halve, merge_tiles

# Coordinates are whole pixels, so tiles of a regular grid lie up to a hundredth of a tile beside it: not to be cut off.
_SLACK = 1 / 16
# Views that go through the encoder at a time, and tiles of one view that the MLP takes at a time without gradients.
_VIEWS, _TILES = 64, 8192


class GigaSSLEncoder(SlideEncoder):
    """Base of both: a slide's vector is the mean of those of random views."""

    def embed_slide(
        self, features: Tensor, grid: Tensor, generator: torch.Generator, views: int = 50, tiles: int | str = 5
    ) -> Tensor:
        """The mean of the vectors of `views` views of `tiles` tiles, each drawn with replacement; of length 1.

        Args:
            features, grid, generator: as in `SlideEncoder.embed`.
            views: R; of no account where tiles is "all".
            tiles: t, or "all": one view that has every tile once.

        Returns:
            (E,).

        Raises:
            ValueError: views or tiles is below 1, or no number.
        """
        if tiles == "all":
            return F.normalize(self.encode(self._move(features[None]), self._place(grid[None]), None)[0], dim=0)
        for name, value in (("views", views), ("tiles", tiles)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected 1 or more" + (' or "all"' if name == "tiles" else ""))
        drawn = torch.randint(len(features), (views, tiles), generator=generator)
        total = 0
        for some in drawn.split(_VIEWS):
            place = some.to(features.device)
            total = total + self.encode(self._move(features[place]), self._place(grid[place]), None).sum(0)
        return F.normalize(total / views, dim=0)

    def _move(self, values: Tensor) -> Tensor:
        weight = next(self.parameters())
        return values.to(weight.device, weight.dtype)

    def _place(self, grid: Tensor) -> Tensor:
        # Not in the weights' dtype: bfloat16 knows even numbers alone from 256 on.
        return grid.to(next(self.parameters()).device)


class GigaSSLSparse(GigaSSLEncoder):
    """Two residual blocks over the grid cells that hold tiles, as ResNet-18's fourth stage, and the mean over sites.

    Tiles that share a cell are averaged. Cells are counted from each slide's smallest x and y, so that the vector does
    not change when a slide is shifted, by whatever distance (by odd ones too, for which the stride of 2 would otherwise
    see other neighbours); nor does it with the order of the tiles, nor, in eval mode, with the other slides.

    Args:
        feature_dim: D.
        embed_dim: E, the width of both blocks.

    Shape: see `SlideEncoder`.

    Raises:
        ValueError: as `SlideEncoder`, or a place that is not finite.

    Source: Lazard et al., Giga-SSL (arXiv:2212.03273), section 3; blocks of ResNet (arXiv:1512.03385).
    """

    def __init__(
        self,
        feature_dim: int,
        embed_dim: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(feature_dim, embed_dim)
        dd = {"device": device, "dtype": dtype}
        self.down = SparseConv(feature_dim, embed_dim, **dd)
        self.convs = nn.ModuleList(SparseConv(embed_dim, embed_dim, **dd) for _ in range(3))
        self.norms = nn.ModuleList(RowBatchNorm(embed_dim, **dd) for _ in range(4))
        self.shortcut = nn.Linear(feature_dim, embed_dim, bias=False, **dd)
        self.shortcut_norm = RowBatchNorm(embed_dim, **dd)

    def encode(self, features: Tensor, grid: Tensor, mask: Tensor | None) -> Tensor:
        x, tiles = merge_tiles(features, _cells(grid, mask), mask)
        sites, down = halve(tiles)
        near = around(sites)
        x = F.relu(self._first(x, down, near) + self.shortcut_norm(self.shortcut(down.average(x))))
        y = F.relu(self.norms[2](self.convs[1](x, near)))
        x = F.relu(self.norms[3](self.convs[2](y, near)) + x)
        return sites.mean(x)

    def _first(self, x: Tensor, down: Pairs, near: Pairs) -> Tensor:
        x = F.relu(self.norms[0](self.down(x, down)))
        return self.norms[1](self.convs[0](x, near))


def _cells(grid: Tensor, mask: Tensor | None) -> Tensor:
    """Whole cells, counted from each slide's smallest x and y: (B, N, 2) -> (B, N, 2) int64."""
    if not grid.isfinite().all():
        raise ValueError("a tile's place (grid) is not finite; extract the slide again")
    grid = grid.double()
    known = grid if mask is None else grid.masked_fill(~mask[..., None], torch.inf)
    return (grid - known.amin(1, keepdim=True) + _SLACK).floor().long()


class GigaSSLMlp(GigaSSLEncoder):
    """An MLP with a shortcut on each tile, and the mean over tiles; it does not see where they lie.

    Args:
        feature_dim: D.
        embed_dim: E, also the width within.

    Shape: see `SlideEncoder`.

    Source: Lazard et al., Giga-SSL (arXiv:2212.03273), the variant without convolutions.
    """

    def __init__(
        self,
        feature_dim: int,
        embed_dim: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(feature_dim, embed_dim)
        dd = {"device": device, "dtype": dtype}
        self.first = nn.Linear(feature_dim, embed_dim, **dd)
        self.second = nn.Linear(embed_dim, embed_dim, **dd)
        self.shortcut = nn.Linear(feature_dim, embed_dim, bias=False, **dd)

    def encode(self, features: Tensor, grid: Tensor, mask: Tensor | None) -> Tensor:
        size = features.shape[1] if torch.is_grad_enabled() else _TILES
        total = 0
        for start in range(0, features.shape[1], size):
            rows = slice(start, start + size)
            x = features[:, rows]
            x = F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x)).float()
            total = total + (x if mask is None else x * mask[:, rows, None]).sum(1)
        return total / (features.shape[1] if mask is None else mask.sum(1, keepdim=True))
