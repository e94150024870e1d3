"""Convolutions over the cells of slides that hold tissue, and over no others: gathers and matrix products alone.

What is to be added to what depends on the places alone, and is found once for all layers that share them: `Pairs`.
For one position of a kernel each target has at most one source, so no sum depends on an order of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_KERNEL = tuple((x, y) for y in range(3) for x in range(3))
# Wider slides would make numbers of cells that 64 bits do not hold; in tiles, none is near.
_WIDEST = 2**23


@dataclass(frozen=True)
class Sites:
    """Cells that hold something, of all slides of a batch, sorted by slide, row and column; none stands twice.

    Attributes:
        places: (M, 3) int64: slide, x, y.
        counts: (B,) int64, how many each slide has; 1 or more.
    """

    places: Tensor
    counts: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """The mean of what stands at each slide's sites, (M, C) -> (B, C) float32."""
        return torch.segment_reduce(x.float(), "mean", lengths=self.counts)


@dataclass(frozen=True)
class Pairs:
    """What a 3x3 kernel adds to what.

    Attributes:
        sources, targets: for each of the kernel's nine positions, row by row, (P,) int64 places of inputs and of the
            outputs that they count for; no output stands twice in one.
        outputs: number of outputs.
    """

    sources: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    outputs: int

    def average(self, x: Tensor) -> Tensor:
        """The mean over all nine cells, of which those without a site count as 0: (M, C) -> (outputs, C)."""
        y = x.new_zeros(self.outputs, x.shape[1])
        for source, target in zip(self.sources, self.targets):
            y = y.index_add(0, target, x[source])
        return y / len(_KERNEL)


class SparseConv(nn.Module):
    """A 3x3 convolution without a bias, at sites alone.

    Args:
        in_dim, out_dim: channels.

    Shape: x (M, in_dim) and `Pairs` -> (outputs, out_dim). `weight` is (9, in_dim, out_dim), the kernel row by
    row; it is that of `F.conv2d`, (out_dim, in_dim, 3, 3), with its axes moved.

    Source: submanifold convolution (`around`): Graham et al., arXiv:1711.10275; initialised as ResNet's
    (arXiv:1502.01852, sec. 2.2, fan out).
    """

    def __init__(
        self, in_dim: int, out_dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(_KERNEL), in_dim, out_dim, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=(2 / (len(_KERNEL) * out_dim)) ** 0.5)

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        # Nine summands in bfloat16 would lose what the products keep.
        y = x.new_zeros(pairs.outputs, self.weight.shape[2], dtype=torch.promote_types(x.dtype, torch.float32))
        for weight, source, target in zip(self.weight, pairs.sources, pairs.targets):
            y = y.index_add(0, target, (x[source] @ weight).to(y.dtype))
        return y.to(x.dtype)


def merge_tiles(features: Tensor, cells: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Sites]:
    """The sites of a batch of slides: tiles that share a cell are averaged.

    Args:
        features: (B, N, D).
        cells: (B, N, 2) int64, (x, y).
        mask: (B, N) bool, False at padding; None has none. Each slide has a tile.

    Returns:
        Features (M, D), and the sites.

    Raises:
        ValueError: a slide is wider than 8 million cells.
    """
    slides = torch.arange(len(cells), device=cells.device)[:, None, None].expand(*cells.shape[:2], 1)
    places, tiles = torch.cat((slides, cells), dim=-1).flatten(0, 1), features.flatten(0, 1)
    if mask is not None:
        places, tiles = places[mask.flatten()], tiles[mask.flatten()]
    box = _Box(places)
    keys, inverse, counts = box.keys(places).unique(return_inverse=True, return_counts=True)
    sites = Sites(box.places(keys), torch.bincount(box.slides(keys), minlength=len(cells)))
    if len(keys) == len(places):
        return tiles[inverse.argsort()], sites
    return torch.segment_reduce(tiles[inverse.argsort(stable=True)], "mean", lengths=counts), sites


def around(sites: Sites) -> Pairs:
    """The pairs of a convolution with stride 1 whose outputs lie where its inputs do (submanifold)."""
    box = _Box(sites.places)
    keys, sources, targets = box.keys(sites.places), [], []
    rows = torch.arange(len(keys), device=keys.device)
    for x, y in _KERNEL:
        if (x, y) == (1, 1):
            sources.append(rows)
            targets.append(rows)
            continue
        wanted = keys + (y - 1) * box.width + (x - 1)
        found = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        there = keys[found] == wanted
        sources.append(found[there])
        targets.append(rows[there])
    return Pairs(tuple(sources), tuple(targets), len(keys))


def halve(sites: Sites) -> tuple[Sites, Pairs]:
    """The outputs of a convolution with stride 2 and without padding, and its pairs.

    There is an output o wherever there is an input x with 2 o <= x <= 2 o + 2 on both axes. On a full grid that is a
    dense convolution whose input is padded by 2 cells on the left and top, and as needed on the right and bottom.
    """
    slide, x, y = sites.places.unbind(1)
    # An even input counts for two outputs of an axis, an odd one for one.
    candidates = torch.cat([torch.stack((slide, (x - i) >> 1, (y - j) >> 1), dim=1) for i in (0, 1) for j in (0, 1)])
    box = _Box(candidates)
    keys = box.keys(candidates).unique()
    sources, targets = [], []
    for i, j in _KERNEL:
        source = (((x - i) % 2 == 0) & ((y - j) % 2 == 0)).nonzero()[:, 0]
        output = torch.stack((slide[source], (x[source] - i) >> 1, (y[source] - j) >> 1), dim=1)
        sources.append(source)
        targets.append(torch.searchsorted(keys, box.keys(output)))
    outputs = Sites(box.places(keys), torch.bincount(box.slides(keys), minlength=len(sites.counts)))
    return outputs, Pairs(tuple(sources), tuple(targets), len(keys))


class _Box:
    """Numbers the cells of the smallest box around some places, with a border of one cell all around."""

    def __init__(self, places: Tensor):
        low, high = places.amin(0).tolist(), places.amax(0).tolist()
        self.left, self.top = low[1] - 1, low[2] - 1
        self.width, self.height = high[1] - low[1] + 3, high[2] - low[2] + 3
        if max(self.width, self.height) > _WIDEST:
            raise ValueError(
                f"a grid spans {self.width - 2} x {self.height - 2} tiles; grid is in tiles: coords / patch_size_level0"
            )

    def keys(self, places: Tensor) -> Tensor:
        slide, x, y = places.unbind(-1)
        return (slide * self.height + y - self.top) * self.width + x - self.left

    def slides(self, keys: Tensor) -> Tensor:
        return keys // (self.height * self.width)

    def places(self, keys: Tensor) -> Tensor:
        row, x = keys // self.width, keys % self.width
        return torch.stack((row // self.height, x + self.left, row % self.height + self.top), dim=-1)
