"""Grid places and neighbours, against a slow look at every pair."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmamba_models.slide.tile_order import grid_places, neighbour_graph

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
    assert torch.equal(grid_places(coords), torch.stack((columns, torch.zeros_like(columns)), -1))


def test_one_tile():
    assert grid_places(torch.tensor([[70, 30]])).tolist() == [[0, 0]]
    assert neighbour_graph(torch.tensor([[70, 30]])).to_dense().tolist() == [[[0.0]]]
