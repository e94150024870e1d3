"""Where the tiles of a slide lie: the orders in which a sequence model reads them, and which are neighbours."""

from __future__ import annotations

import torch
from torch import Tensor


def scan_order(coords: Tensor, mask: Tensor | None = None, transposed: bool = False) -> Tensor:
    """The order that reads the tiles row by row, or column by column.

    Args:
        coords: (B, N, 2), pixels (x, y) of the tiles.
        mask: (B, N) bool, False at padding, which comes last; None has no padding.
        transposed: column by column instead of row by row.

    Returns:
        (B, N) int64, places of the tiles.
    """
    minor, major = coords.unbind(-1)[:: -1 if transposed else 1]
    order = minor.argsort(dim=1, stable=True)
    order = order.gather(1, major.gather(1, order).argsort(dim=1, stable=True))
    if mask is None:
        return order
    return order.gather(1, (~mask).gather(1, order).byte().argsort(dim=1, stable=True))


def neighbour_graph(coords: Tensor) -> Tensor:
    """The graph that joins each tile with those of the eight around it that are there, normalised by degree.

    ``D^(-1/2) A D^(-1/2)``; a tile without neighbours has an empty row. A neighbour is one step of the grid away in x,
    in y or in both, to within a quarter of a step or a pixel. A slide may have several grids, as CLAM lays one in each
    contour: each has its own edges.

    Args:
        coords: (n, 2) pixels; tiles at the same place count as one, the last.

    Returns:
        (1, n, n) sparse COO, float32.

    Source: Kipf and Welling, arXiv:1609.02907, equation 2.
    """
    count = len(coords)
    tiles = torch.arange(count, device=coords.device)
    places, inverse = coords.double().unique(dim=0, return_inverse=True)
    last = tiles.new_zeros(len(places)).scatter_reduce(0, inverse, tiles, "amax")
    step = _grid_step(places)
    slack = max(step / 4, 1.0)  # pixels are rounded
    # Cells are as wide as the farthest neighbour is away, so a tile's neighbours are in the nine cells around it.
    cell = ((places - places.amin(dim=0)) / (step + slack)).long() + 1
    width = int(cell[:, 0].max()) + 2  # a border all around: no neighbour is on the other side of the slide
    key = cell[:, 1] * width + cell[:, 0]
    ordered, place = key.sort(stable=True)
    pairs = []
    for down in (-1, 0, 1):
        middle = key[inverse] + down * width
        first = torch.searchsorted(ordered, middle - 1)
        found = torch.searchsorted(ordered, middle + 1, right=True) - first
        source = tiles.repeat_interleave(found)
        nth = torch.arange(len(source), device=coords.device) - (found.cumsum(0) - found)[source]
        target = place[first[source] + nth]
        apart = (places[target] - places[inverse[source]]).abs()
        steps = (apart / step).round()
        near = (steps.amax(dim=1) == 1) & ((apart - steps * step).abs() <= slack).all(dim=1)
        pairs.append(torch.stack((source[near], last[target[near]])))
    edges = torch.cat(pairs, dim=1)
    degree = torch.bincount(edges[0], minlength=count).float()
    values = (degree[edges[0]] * degree[edges[1]].clamp(min=1)).rsqrt()
    batch = torch.zeros_like(edges[:1])
    indices = torch.cat((batch, edges))
    return torch.sparse_coo_tensor(indices, values, (1, count, count), check_invariants=False).coalesce()


def _grid_step(places: Tensor) -> float:
    """Pixels from a tile to the next in its row or column, of distinct places (n, 2).

    Several grids, and tiles that are on none, have columns at any distance, so it is the gaps between successive tiles
    of one row or column that count: the smallest of those that are a quarter as frequent as the most frequent, as
    roundings make two of one step. A thin sample of a slide's tiles has gaps of many steps, none of them frequent:
    then it is the smallest distance between two columns, or two rows, which is right for one grid.
    """
    gaps = []
    for major_first in (places, places.flip(-1)):
        apart = major_first.unique(dim=0).diff(dim=0)
        gaps.append(apart[apart[:, 0] == 0, 1])
    values, counts = torch.cat(gaps).unique(return_counts=True)
    if len(values) and 2 * counts.max() >= len(places):
        return values[4 * counts >= counts.max()].min().item()
    distances = torch.cat([axis.unique().diff() for axis in places.unbind(-1)])
    return distances.min().item() if len(distances) else 1.0
