"""Neighbours in a slide: all of the window, none of another slide, in any order and at any offset."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sgcl_cases import grid_manifest

from ssmamba_models.ssl.spatial_neighbors import SpatialNeighborIndex


def test_inside_a_full_grid_there_are_24():
    index = SpatialNeighborIndex(grid_manifest(columns=7, rows=7))
    neighbors, valid = index.query(torch.tensor([24, 0, 49 + 24]))  # the centre, a corner, the other slide's centre
    assert neighbors.shape == valid.shape == (3, 24)
    assert neighbors.dtype == torch.int64
    assert valid.sum(1).tolist() == [24, 8, 24]
    window = {7 * row + column for row in range(1, 6) for column in range(1, 6)} - {24}
    assert set(neighbors[0].tolist()) == window
    assert set(neighbors[2].tolist()) == {49 + tile for tile in window}


@settings(max_examples=40, deadline=None)
@given(
    places=st.lists(
        st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(-6, 6), st.integers(-6, 6)),
        min_size=1, max_size=60, unique=True,
    ),
    radius=st.sampled_from([1.5, 2.0, 3.0, 4.2]),
    offset=st.sampled_from([0, 10**6, -(10**6)]),
)  # fmt: skip
def test_it_finds_what_all_distances_find(places, radius, offset):
    slides, x, y = zip(*places)
    x, y = np.array(x) + offset, np.array(y) - offset
    index = SpatialNeighborIndex(SimpleNamespace(slides=slides, x=x, y=y), radius)
    neighbors, valid = index.query(torch.arange(len(places)))
    for tile, (slide, near, there) in enumerate(zip(slides, neighbors, valid)):
        distance = np.hypot(x - x[tile], y - y[tile])
        same = np.array(slides) == slide
        assert sorted(near[there].tolist()) == np.flatnonzero(same & (distance > 0) & (distance < radius)).tolist()
        assert (near[~there] == tile).all()


def test_a_lone_tile_has_none():
    manifest = SimpleNamespace(slides=["a", "b", "b"], x=np.array([0, 0, 1]), y=np.array([0, 0, 0]))
    assert SpatialNeighborIndex(manifest).query(torch.arange(3))[1].sum(1).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.array([0, 1, 0])}, r"tiles 0 and 2 both lie at x 0, y 0 of slide 'a'"),
        ({"x": np.array([0, 1])}, "3 slides, 2 x and 3 y"),
        ({"x": np.array([0.0, 0.5, 1.0])}, "x is of type float64, expected whole numbers"),
        ({"x": np.array([0, 2**40, 2]), "y": np.array([0, 2**40, 0])}, "too many to number.*grid units"),
    ],
)
def test_bad_places_are_named(changes, message):
    columns = {"slides": ["a", "a", "a"], "x": np.array([0, 1, 2]), "y": np.array([0, 0, 0]), **changes}
    with pytest.raises(ValueError, match=message):
        SpatialNeighborIndex(SimpleNamespace(**columns))


@pytest.mark.parametrize("radius", [0, 1, float("nan"), 1e6])
def test_a_radius_without_places_is_refused(radius):
    with pytest.raises(ValueError, match="radius is"):
        SpatialNeighborIndex(grid_manifest(), radius)
