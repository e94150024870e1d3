"""Grid places and neighbours, against a slow look at every pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmamba_models.slide.tile_order import neighbour_graph

CELLS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=25, unique=True)


@settings(deadline=None, max_examples=40)
@given(cells=CELLS, step=st.floats(3, 900))
def test_the_graph_joins_the_eight_neighbours(cells, step):
    """Pixels are rounded from a step that is no whole number, as real ones are."""
    # Two neighbours in a row tell the step, as any real slide's tiles do.
    cells = [*cells, (20, 20), (21, 20)]
    coords = torch.tensor([(round(x * step), round(y * step)) for x, y in cells])
    count = len(cells)
    near = torch.zeros(count, count)
    for i, (x, y) in enumerate(cells):
        for j, (u, v) in enumerate(cells):
            near[i, j] = float(i != j and max(abs(x - u), abs(y - v)) == 1)
    degree = near.sum(1)
    want = near / (degree[:, None] * degree[None]).sqrt().clamp(min=1)
    torch.testing.assert_close(neighbour_graph(coords).to_dense()[0], want)


def test_roundings_do_not_add_up():
    step = 448.37
    columns = torch.arange(0, 3000)
    coords = torch.stack(((columns * step).round().long(), torch.zeros_like(columns)), -1)
    assert edges(coords) == {(i, j) for i in range(3000) for j in (i - 1, i + 1) if 0 <= j < 3000}


def test_one_tile():
    assert neighbour_graph(torch.tensor([[70, 30]])).to_dense().tolist() == [[[0.0]]]


def test_tiles_at_one_place_count_as_the_last():
    assert edges(torch.tensor([[0, 0], [256, 0], [0, 0]])) == {(0, 1), (1, 2), (2, 1)}


@settings(deadline=None, max_examples=40)
@given(
    x=st.integers(0, 255),
    y=st.integers(0, 255),
    gap=st.integers(2, 5),
    sides=st.tuples(*[st.integers(2, 6)] * 4),
    order=st.randoms(use_true_random=False),
)
def test_each_of_two_grids_has_its_own_neighbours(x, y, gap, sides, order):
    """CLAM lays the tiles of a contour from the corner of its bounding box."""
    first, second = grid(sides[0], sides[1]), grid(sides[2], sides[3])
    # Beside the first grid and within its rows, but too far for edges across.
    second = second + torch.tensor([(sides[0] - 1 + gap) * 256 + x, y])
    both = torch.cat((first, second))
    moved = list(range(len(both)))
    order.shuffle(moved)
    want = edges(first) | {(i + len(first), j + len(first)) for i, j in edges(second)}
    assert {(moved[i], moved[j]) for i, j in edges(both[moved])} == want


@pytest.mark.parametrize(("offset", "across"), [(44, True), (64, True), (65, False), (100, False)])
def test_grids_that_lie_among_each_other_join_within_a_quarter_step(offset, across):
    first = grid(6, 5) + 1000
    count, own = len(first), edges(first)
    found = edges(torch.cat((first, first + offset)))
    assert {(i, j) for i, j in found if max(i, j) < count} == own
    assert {(i - count, j - count) for i, j in found if min(i, j) >= count} == own
    assert {(i, j - count) for i, j in found if i < count <= j} == (own if across else set())
    assert found == {(j, i) for i, j in found}


@settings(deadline=None, max_examples=40)
@given(x=st.integers(-300, 3000), y=st.integers(-300, 3000))
def test_a_stray_tile_changes_nothing_for_the_others(x, y):
    coords = grid(8, 7)
    found = edges(torch.cat((torch.tensor([[x, y]]), coords)))
    assert {(i - 1, j - 1) for i, j in found if min(i, j) > 0} == edges(coords)


def test_a_thin_sample_has_the_step_of_its_slide():
    """One tile in twenty: a gap of one step is no more frequent than others."""
    generator = torch.Generator().manual_seed(0)
    cells = grid(60, 60)[torch.randperm(3600, generator=generator)[:180]] // 256
    apart = (cells[:, None] - cells[None]).abs().amax(-1)
    assert edges(cells * 256) == {tuple(pair) for pair in (apart == 1).nonzero().tolist()}


def grid(columns: int, rows: int) -> torch.Tensor:
    """Pixels (columns * rows, 2) of tiles 256 apart."""
    return torch.cartesian_prod(torch.arange(columns), torch.arange(rows)) * 256


def edges(coords: torch.Tensor) -> set[tuple[int, int]]:
    return {tuple(pair) for pair in neighbour_graph(coords).indices()[1:].T.tolist()}
