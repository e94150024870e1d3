"""Tiles lie where they should, cover the slide, and know how much tissue they show."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmamba_models.wsi.field_of_view import find_field_of_view
from ssmamba_models.wsi.grid import make_grid
from ssmamba_models.wsi.tissue import TissueMask

MPP = st.floats(0.2, 4.0)


@settings(max_examples=200, deadline=None)
@given(
    size=st.tuples(st.integers(1, 30_000), st.integers(1, 30_000)),
    level0=st.floats(0.1, 1.0),
    target=MPP,
    tile_and_overlap=st.integers(32, 1024).flatmap(lambda tile: st.tuples(st.just(tile), st.integers(0, tile - 16))),
)
def test_geometry_for_any_mpp(size, level0, target, tile_and_overlap):
    tile, overlap = tile_and_overlap
    step = (tile - overlap) * target / level0
    if step < 1 or math.prod(size) / step**2 > 1e5:
        return
    grid = make_grid(size, level0, target, tile, overlap)
    assert grid.coords.dtype == np.int64
    assert len(grid) == math.prod(grid.shape)
    assert grid.patch_size_level0 == pytest.approx(tile * target / level0, rel=1e-12)
    assert abs(grid.mpp_error) < 1e-12
    # Row by row, and nowhere more than half a pixel off exact multiples of the step.
    rows, columns = grid.shape
    exact = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=2).reshape(-1, 2)
    assert np.array_equal(grid.cells, exact)
    assert np.abs(grid.coords - exact * step).max() <= 0.5 + 1e-6
    # The slide is covered, and no tile lies beyond it.
    ends = grid.coords[-1] + grid.patch_size_level0
    assert all(end >= length - 2 for end, length in zip(ends, size))
    assert all(start < length for start, length in zip(grid.coords[-1], size))


@settings(max_examples=300, deadline=None)
@given(
    downsamples=st.lists(st.floats(1.5, 4.3), max_size=3),
    level0=st.floats(0.2, 1.0),
    target=MPP,
    width=st.integers(1, 1024),
)
def test_the_field_of_view_is_exact_to_half_a_pixel_for_any_pyramid(downsamples, level0, target, width):
    levels = tuple(np.cumprod([1.0, *downsamples]))
    view = find_field_of_view(levels, 0, 0, width, width, target / level0)
    assert abs(view.level0_size[0] - width * target / level0) < 0.5
    # The coarsest level that is fine enough, to a thousandth.
    assert view.downsample <= target / level0 * 1.001 or view.level == 0
    assert all(coarser > target / level0 for coarser in levels[view.level + 1 :])


def test_a_level_that_scanners_round_is_used_as_it_is():
    view = find_field_of_view((1.0, 4.00012), 0, 0, 224, 224, 4.0)
    assert (view.level, view.direct, view.upsampled) == (1, True, False)


def test_a_small_grid_by_hand():
    grid = make_grid((1000, 500), 0.25, 0.5, 128, 28)
    assert (grid.patch_size_level0, grid.step_level0, grid.shape) == (256.0, 200.0, (3, 5))
    assert grid.coords[:3].tolist() == [[0, 0], [200, 0], [400, 0]]
    assert grid.coords[-1].tolist() == [800, 400]
    assert grid.tissue is None
    assert not grid.upsampled
    assert make_grid((1000, 500), 0.25, 0.2, 128).upsampled


def test_a_slide_smaller_than_a_tile_has_one():
    assert make_grid((50, 40), 0.5, 0.5, 224).coords.tolist() == [[0, 0]]


class TestTissueShare:
    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 1000),
        downsample=st.floats(1.0, 40.0),
        scale=st.floats(0.5, 8.0),
        tile=st.integers(8, 64),
    )
    def test_it_is_exact_to_the_fraction_of_a_mask_pixel(self, seed, downsample, scale, tile):
        mask = TissueMask(np.random.default_rng(seed).random((13, 17)) < 0.5, downsample)
        size = (int(17 * downsample), int(13 * downsample))
        if size[0] / (tile * scale) > 40:
            return
        grid = make_grid(size, 1.0, scale, tile, mask=mask, min_tissue=0)
        assert len(grid) == math.prod(grid.shape)
        for (x, y), share in list(zip(grid.coords, grid.tissue))[::7]:
            assert share == pytest.approx(self.by_overlap(mask, x, y, grid.patch_size_level0), abs=1e-9)

    def by_overlap(self, mask, x, y, side):
        """Each mask pixel's overlap with the tile, summed up."""
        rows, columns = (
            np.clip(np.minimum(edges[1:], start + side) - np.maximum(edges[:-1], start), 0, None)
            for start, count in ((y, 13), (x, 17))
            for edges in [np.arange(count + 1) * mask.downsample]
        )
        return rows @ mask.mask @ columns / side**2

    def test_tiles_below_the_least_share_are_left_out(self):
        mask = TissueMask(np.zeros((10, 10), bool), 10.0)
        mask.mask[:, :5] = True
        grid = make_grid((100, 100), 0.5, 0.5, 20, mask=mask, min_tissue=0.5)
        # Columns begin at 0, 20, ..., 80, and tissue ends at 50.
        assert grid.coords[:3].tolist() == [[0, 0], [20, 0], [40, 0]]
        assert grid.tissue[:3].tolist() == [1.0, 1.0, 0.5]
        assert (len(grid), grid.shape) == (15, (5, 5))
        assert len(make_grid((100, 100), 0.5, 0.5, 20, mask=mask, min_tissue=0.6)) == 10

    def test_no_tissue_no_tiles(self):
        grid = make_grid((100, 100), 0.5, 0.5, 20, mask=TissueMask(np.zeros((10, 10), bool), 10.0))
        assert (grid.coords.shape, len(grid), grid.cells.shape) == ((0, 2), 0, (0, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlap": 224}, "overlap is 224 px and the tile size 224 px"),
        ({"overlap": 300}, "smaller than the tile size"),
        ({"overlap": -1}, "0 or more"),
        ({"tile_size": 0}, "tile size is 0 px"),
        ({"target_mpp": 0}, "mpp is 0, expected micrometres"),
        ({"level0_mpp": float("nan")}, "the slide's mpp is nan"),
        ({"min_tissue": 1.1}, "share of tissue is 1.1"),
        ({"dimensions": (0, 10)}, "dimensions are"),
        ({"overlap": 223, "target_mpp": 0.1}, "begin every 0.2 level-0 pixels"),
    ],
)
def test_impossible(change, message):
    with pytest.raises(ValueError, match=message):
        make_grid(**{"dimensions": (1000, 1000), "level0_mpp": 0.5, "target_mpp": 0.5, "tile_size": 224} | change)
