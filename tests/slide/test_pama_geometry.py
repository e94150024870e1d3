"""PAMA's geometry: anchors, distances and sectors, against plain definitions, and under turns of the slide."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmamba_models.slide.pama_geometry import slide_geometry, spread_geometry, stack_geometry

pytestmark = pytest.mark.usefixtures("one_thread")


def tissue(tiles: int, seed: int = 0, side: int = 12) -> torch.Tensor:
    """(tiles, 2) different places of a grid."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(side * side, generator=generator)[:tiles]
    return torch.stack([place % side, place // side], dim=-1).float()


def turned(grid: torch.Tensor) -> torch.Tensor:
    """By 90 degrees, somewhere else."""
    return torch.stack([-grid[:, 1], grid[:, 0]], dim=-1) + torch.tensor([31.0, -4.0])


def shifted_sectors(polar: torch.Tensor, by: int, bins: int = 8) -> torch.Tensor:
    return torch.where(polar < bins, (polar.int() + by) % bins, bins).to(polar.dtype)


def test_bins_are_those_of_the_definition():
    grid = tissue(40, side=9)
    geometry = slide_geometry(grid, tiles_per_anchor=10)
    assert len(geometry.anchors) == len(set(geometry.anchors.tolist())) == 5
    points = grid.tolist()
    largest = max(math.dist(a, b) for a in points for b in points)
    for row, k in enumerate(geometry.anchors.tolist()):
        for j, point in enumerate(points):
            step = math.dist(point, points[k]) / (largest / 64)
            angle = math.atan2(point[0] - points[k][0], point[1] - points[k][1]) % (2 * math.pi)
            assert geometry.distance[row, j] == math.floor(step + 1e-4)
            assert geometry.polar[row, j] == (8 if j == k else math.floor(angle / (math.pi / 4) + 1e-4) % 8)


def test_anchors_are_the_middles_of_clusters():
    """Three piles of 3 x 3 tiles: the middle tile of each is nearest to its centroid."""
    pile = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    grid = torch.cat([pile, pile + torch.tensor([50.0, 0.0]), pile + torch.tensor([0.0, 90.0])])
    geometry = slide_geometry(grid, tiles_per_anchor=13)
    assert sorted(geometry.anchors.tolist()) == [4, 13, 22]


@pytest.mark.parametrize(
    ("tiles", "per_anchor", "most", "anchors"), [(1, 144, 128, 1), (144, 144, 128, 2), (50, 2, 7, 7), (3, 1, 9, 3)]
)
def test_number_of_anchors(tiles, per_anchor, most, anchors):
    geometry = slide_geometry(tissue(tiles), per_anchor, most)
    assert geometry.anchors.shape == geometry.anchor_mask.shape == (anchors,)
    assert geometry.distance.shape == geometry.polar.shape == (anchors, tiles)


@settings(deadline=None, max_examples=25)
@given(tiles=st.integers(1, 90), seed=st.integers(0, 99), fractional=st.booleans())
def test_turning_shifts_all_sectors_alike_and_nothing_else(tiles, seed, fractional):
    grid = tissue(tiles, seed)
    if fractional:
        grid += torch.rand(grid.shape, generator=torch.Generator().manual_seed(seed)).mul(256).floor() / 256
    before, after = slide_geometry(grid, 9), slide_geometry(turned(grid), 9)
    assert torch.equal(before.anchors, after.anchors)
    assert torch.equal(before.distance, after.distance)
    assert torch.equal(shifted_sectors(before.polar, -2), after.polar)


def test_shift_and_scale_change_nothing():
    grid = tissue(70)
    want, found = slide_geometry(grid, 9), slide_geometry(grid * 512 + 3000, 9)
    for name in ("anchors", "distance", "polar"):
        assert torch.equal(getattr(want, name), getattr(found, name))


def test_the_largest_distance_is_bin_64():
    geometry = slide_geometry(torch.tensor([[0.0, 0.0], [7.0, 3.0]]), tiles_per_anchor=2)
    assert sorted(geometry.distance.tolist()) == [[0, 64], [64, 0]]


def test_the_largest_distance_need_not_be_between_outermost_tiles():
    """Of this triangle's corners, (5, 9) is nearest to the middle of the slide, and end of a longest side."""
    geometry = slide_geometry(torch.tensor([[0.0, 0.0], [10.0, 0.0], [5.0, 9.0]]), tiles_per_anchor=1)
    back = geometry.anchors.argsort()
    base = math.floor(10 / (math.hypot(5, 9) / 64))
    assert base == 62
    assert geometry.distance[back].tolist() == [[0, base, 64], [base, 0, 64], [64, 64, 0]]


def test_tiles_at_one_place():
    geometry = slide_geometry(torch.full((5, 2), 7.0), tiles_per_anchor=2)
    assert geometry.distance.eq(0).all()
    assert geometry.polar.eq(8).all()


def test_a_batch_pads_and_spreads():
    grid = tissue(20)
    mask = torch.zeros(26, dtype=torch.bool)
    mask[torch.randperm(26, generator=torch.Generator().manual_seed(1))[:20]] = True
    plain = slide_geometry(grid, 5)
    spread = spread_geometry(plain, mask)
    assert torch.equal(spread.distance[:, mask], plain.distance)
    assert torch.equal(spread.polar[:, mask], plain.polar)
    assert spread.polar[:, ~mask].eq(8).all()
    assert mask[spread.anchors].all()
    batch = stack_geometry([slide_geometry(grid[:3], 5), plain])
    assert batch.distance.shape == (2, 5, 20)
    assert batch.anchor_mask.sum(1).tolist() == [1, 5]
    assert batch.polar[0, :, 3:].eq(8).all()
    assert torch.equal(batch.polar[1], plain.polar)


@pytest.mark.parametrize(
    ("grid", "arguments", "message"),
    [
        (torch.zeros(0, 2), {}, r"\(0, 2\), expected \(N, 2\)"),
        (torch.zeros(3), {}, r"expected \(N, 2\)"),
        (torch.tensor([[0.0, torch.nan], [1.0, 1.0]]), {}, "1 of 2 tiles have no coordinates"),
        (torch.tensor([[0.0, torch.inf]]), {}, "no coordinates"),
        (torch.zeros(3, 2), {"tiles_per_anchor": 0}, "tiles_per_anchor is 0"),
        (torch.zeros(3, 2), {"max_anchors": 0}, "max_anchors is 0"),
        (torch.zeros(3, 2), {"polar_bins": 0}, "polar_bins is 0"),
    ],
)
def test_bad_input(grid, arguments, message):
    with pytest.raises(ValueError, match=message):
        slide_geometry(grid, **arguments)
