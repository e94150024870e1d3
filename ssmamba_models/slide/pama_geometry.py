"""PAMA's geometry: a few tiles of a slide as anchors, and how far and in which direction every tile lies from each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

DISTANCE_BINS = 64
_LLOYD_STEPS = 10
# Tiles of a grid lie exactly between two bins; rounding must not decide for them.
_TIE = 1e-4


@dataclass(frozen=True)
class PamaGeometry:
    """Where the N tiles of a slide lie, seen from its K anchors; the same with a leading B for a batch.

    Attributes:
        anchors: (K,) int64, the tiles that are anchors.
        distance: (K, N) uint8, 0..64: the distance from anchor to tile in 64ths of the slide's largest.
        polar: (K, N) uint8, 0..R-1: the sector in which the tile lies, R where it has no direction: the anchor itself,
            tiles at the same place, and padding.
        anchor_mask: (K,) bool, False at padding.
    """

    anchors: Tensor
    distance: Tensor
    polar: Tensor
    anchor_mask: Tensor

    def to(self, device: torch.device) -> PamaGeometry:
        """The same on a device."""
        return PamaGeometry(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def slide_geometry(
    grid: Tensor, tiles_per_anchor: int = 144, max_anchors: int = 128, polar_bins: int = 8
) -> PamaGeometry:
    """Choose a slide's anchors, and see all tiles from them.

    K = floor(N / tiles_per_anchor) + 1 anchors, at most `max_anchors` and N: the tiles nearest to the centroids of
    k-means on the coordinates alone. Nothing is drawn: k-means begins with tiles that each lie farthest from those
    before. Shifting and scaling the slide change nothing; turning it by a multiple of 90 degrees keeps anchors and
    distances, and shifts all sectors alike. It is computed on the CPU, so that devices agree.

    Args:
        grid: (N, 2), (x, y) of the tiles in any unit.
        tiles_per_anchor: how many tiles an anchor stands for.
        max_anchors: most anchors.
        polar_bins: R, number of sectors; the first begins at +y and goes on towards +x.

    Returns:
        The geometry, on the CPU.

    Raises:
        ValueError: no tile, coordinates that are missing (NaN) or infinite, or an argument below 1.

    Source: PAMA (arXiv:2407.07504), sec. III-B; sectors by atan2(dx, dy).
    """
    for name, value in (("tiles_per_anchor", tiles_per_anchor), ("max_anchors", max_anchors)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")
    if not 1 <= polar_bins <= 64:
        raise ValueError(f"polar_bins is {polar_bins}, expected 1 to 64")
    points = _centred(grid)
    tiles = points.shape[1]
    count = min(tiles // tiles_per_anchor + 1, max_anchors, tiles)
    anchors = _nearest(_k_means(points, count), points)
    dx, dy = (axis - axis[anchors][:, None] for axis in points)
    distance = (dx * dx + dy * dy).sqrt_()
    polar = _sectors(dx, dy, polar_bins).masked_fill_(distance == 0, polar_bins)
    return PamaGeometry(
        anchors,
        _distance_bins(distance, _diameter(points)),
        polar,
        torch.ones(count, dtype=torch.bool),
    )


def spread_geometry(geometry: PamaGeometry, mask: Tensor, polar_bins: int = 8) -> PamaGeometry:
    """The geometry of a slide whose tiles stand where mask (N,) is True, others being padding."""
    distance = geometry.distance.new_zeros(len(geometry.anchors), len(mask))
    polar = torch.full_like(distance, polar_bins)
    distance[:, mask], polar[:, mask] = geometry.distance, geometry.polar
    return PamaGeometry(mask.nonzero()[:, 0][geometry.anchors], distance, polar, geometry.anchor_mask)


def stack_geometry(slides: Sequence[PamaGeometry], polar_bins: int = 8) -> PamaGeometry:
    """Several slides as a batch: B slides, padded to the most anchors and tiles; padding has no direction."""
    return PamaGeometry(
        pad_sequence([slide.anchors for slide in slides], batch_first=True),
        pad_stack([slide.distance for slide in slides]),
        pad_stack([slide.polar for slide in slides], polar_bins),
        pad_sequence([slide.anchor_mask for slide in slides], batch_first=True),
    )


def pad_stack(tensors: Sequence[Tensor], fill: float = 0) -> Tensor:
    """Tensors of one rank as one, each padded at the ends of its axes: (B, *largest shape)."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors))]
    stacked = tensors[0].new_full((len(tensors), *largest), fill)
    for place, tensor in zip(stacked, tensors):
        place[tuple(slice(size) for size in tensor.shape)] = tensor
    return stacked


def _centred(grid: Tensor) -> Tensor:
    """x and y, (2, N) float32 about the middle of the slide: exact for whole numbers, turned or shifted."""
    if grid.dim() != 2 or grid.shape[1] != 2 or len(grid) == 0:
        raise ValueError(f"grid has shape {tuple(grid.shape)}, expected (N, 2), N 1 or more")
    points = grid.detach().cpu().double().T.contiguous()
    if not points.isfinite().all():
        bad = int((~points.isfinite()).any(dim=0).sum())
        raise ValueError(f"{bad} of {len(grid)} tiles have no coordinates (NaN or infinite); PAMA needs all of them")
    least, most = points.aminmax(dim=1, keepdim=True)
    return (points - (least + most) / 2).float()


def _k_means(points: Tensor, count: int) -> Tensor:
    """Centroids (2, count) by Lloyd's steps from points that each lie farthest from those before."""
    centroids = points[:, _farthest_points(points, count)]
    before = None
    for _ in range(_LLOYD_STEPS):
        nearest = _nearest(points, centroids)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        members = torch.bincount(nearest, minlength=count)
        sums = torch.stack([torch.bincount(nearest, axis, minlength=count) for axis in points])
        # A centroid that lost all tiles to equal ones stays.
        centroids = torch.where(members > 0, sums / members.clamp(min=1), centroids)
    return centroids


def _farthest_points(points: Tensor, count: int) -> Tensor:
    x, y = points
    chosen = [(x * x + y * y).argmax()]
    nearest = torch.full_like(x, torch.inf)
    while len(chosen) < count:
        last = chosen[-1]
        nearest = torch.minimum(nearest, (x - x[last]).square_().add_((y - y[last]).square_()))
        chosen.append(nearest.argmax())
    return torch.stack(chosen)


def _nearest(a: Tensor, b: Tensor) -> Tensor:
    """The place in b (2, m) of the point that is nearest to each of a (2, n): (n,) int64."""
    # numpy's argmin over short rows takes a tenth of torch's time.
    return torch.from_numpy(_squared_distances(a, b).numpy().argmin(axis=1))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(2, n) and (2, m) -> (n, m); by subtraction, so that turning both by 90 degrees gives the same bits."""
    squares = (a[0][:, None] - b[0]).square_()
    return squares.add_((a[1][:, None] - b[1]).square_())


def _diameter(points: Tensor, columns: int = 1024) -> Tensor:
    """The largest distance between two points.

    Points at r1 and r2 from the centre are at most r1 + r2 apart: with a distance that some pair has, most points in
    the middle of a slide are ruled out.
    """
    radius = points.square().sum(0).sqrt_()
    reached = _squared_distances(points[:, radius.argmax()][:, None], points).max().sqrt()
    rim = points[:, radius >= (reached - radius.max()) * (1 - _TIE)]
    return torch.stack([_squared_distances(part, rim).max() for part in rim.split(columns, dim=1)]).max().sqrt()


def _distance_bins(distance: Tensor, largest: Tensor) -> Tensor:
    share = distance / largest if largest > 0 else distance
    return share.mul(DISTANCE_BINS).add_(_TIE).clamp_(max=DISTANCE_BINS).to(torch.uint8)


def _sectors(dx: Tensor, dy: Tensor, polar_bins: int) -> Tensor:
    """Directions -> sectors, uint8."""
    turns = torch.atan2(dx, dy).mul_(polar_bins / (2 * math.pi)).add_(polar_bins + _TIE)
    return turns.to(torch.uint8).remainder_(polar_bins)
