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


def grid_places(coords: Tensor) -> Tensor:
    """Columns and rows of the tiles, counted in steps of the grid.

    The step is the smallest distance between two columns, or two rows. Each gap is rounded to whole steps on its own:
    pixels are rounded, and over a whole slide the roundings would add up.

    Shape: (n, 2) pixels -> (n, 2) int64, from 0.
    """
    axes = [axis.double().unique(return_inverse=True) for axis in coords.unbind(-1)]
    gaps = [values.diff() for values, _ in axes]
    step = torch.cat(gaps).min() if sum(map(len, gaps)) else 1.0
    places = []
    for gap, (_, inverse) in zip(gaps, axes):
        position = torch.cat((gap.new_zeros(1), (gap / step).round().cumsum(0))).long()
        places.append(position[inverse])
    return torch.stack(places, dim=-1)


def neighbour_graph(coords: Tensor) -> Tensor:
    """The graph that joins each tile with those of the eight around it that are there, normalised by degree.

    ``D^(-1/2) A D^(-1/2)``; a tile without neighbours has an empty row.

    Args:
        coords: (n, 2) pixels; tiles at the same place count as one, the last.

    Returns:
        (1, n, n) sparse COO, float32.

    Source: Kipf and Welling, arXiv:1609.02907, equation 2.
    """
    count = len(coords)
    place = grid_places(coords) + 1  # a border all around: no neighbour is on the other side of the slide
    width = int(place[:, 0].max()) + 2
    key = place[:, 1] * width + place[:, 0]
    ordered, tile = key.sort(stable=True)
    pairs = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            if down or right:
                wanted = key + down * width + right
                # The last of those that are equal.
                found = (torch.searchsorted(ordered, wanted, right=True) - 1).clamp(min=0)
                there = ordered[found] == wanted
                pairs.append(torch.stack((there.nonzero()[:, 0], tile[found[there]])))
    edges = torch.cat(pairs, dim=1)
    degree = torch.bincount(edges[0], minlength=count).float()
    values = (degree[edges[0]] * degree[edges[1]].clamp(min=1)).rsqrt()
    batch = torch.zeros_like(edges[:1])
    places = torch.cat((batch, edges))
    return torch.sparse_coo_tensor(places, values, (1, count, count), check_invariants=False).coalesce()
