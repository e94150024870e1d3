"""Heatmaps: which pixels a tile colours, the polygons for QuPath, and slides that do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("h5py", reason="heatmaps need the [mil] extra")
pytest.importorskip("matplotlib", reason="heatmaps need the [mil] extra")
pytestmark = pytest.mark.usefixtures("one_thread")

from ssmamba_models.data.bags import open_bag  # noqa: E402
from ssmamba_models.data.features import open_slide_features  # noqa: E402
from ssmamba_models.data.synthetic_slides import write_synthetic_slides  # noqa: E402
from ssmamba_models.engine.mil_model import save_mil_model  # noqa: E402
from ssmamba_models.evaluation.heatmap import (  # noqa: E402
    attention_ranks,
    color_tiles,
    draw_heatmap,
    tiles_geojson,
)
from ssmamba_models.slide.aggregators import create_aggregator  # noqa: E402


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heat")
    write_synthetic_slides(folder, patients=2, tiles=30, feature_dim=6)
    return folder / "slide_001_0.h5"


@pytest.fixture(scope="module")
def model(features, tmp_path_factory):
    """Weights of an aggregator that was not trained."""
    path = tmp_path_factory.mktemp("model") / "weights.safetensors"
    _, provenance = open_bag(features)
    save_mil_model(path, create_aggregator("mean", 6, 2), "mean", {}, ("no", "yes"), provenance)
    return path


def test_ranks():
    assert attention_ranks(np.array([0.1, 0.5, 0.3, 0.1])).tolist() == [1 / 6, 1, 2 / 3, 1 / 6]
    assert attention_ranks(np.array([1.0])).tolist() == [1.0]
    assert attention_ranks(np.full(3, 1 / 3)).tolist() == [0.5, 0.5, 0.5]


@settings(deadline=None, max_examples=20)
@given(side=st.floats(2, 90), downsample=st.floats(1, 40))
def test_tiles_leave_no_gap_and_colour_nothing_else(side, downsample):
    places = np.stack(np.meshgrid(range(3), range(4)), -1).reshape(-1, 2)
    coords = np.round(places * side).astype(int) + 50
    image = np.full((300, 300, 3), 255, np.uint8)
    picture = np.asarray(color_tiles(image, downsample, coords, side, np.zeros(12), opacity=1.0))
    coloured = (picture != 255).any(axis=-1)
    left, top = (round(50 / downsample),) * 2
    right, bottom = (max(round((coords[:, axis].max() + side) / downsample), 1) for axis in (0, 1))
    assert coloured[top : bottom, left : right].all()
    assert coloured.sum() <= (bottom - top + 2) * (right - left + 2)


def test_overlapping_tiles_are_averaged_and_mixed():
    image = np.full((10, 20, 3), 100, np.uint8)
    values = np.array([0.0, 1.0])
    coords = np.array([(0, 0), (5, 0)])
    full = np.asarray(color_tiles(image, 1.0, coords, 10, values, 1.0)).astype(int)
    half = np.asarray(color_tiles(image, 1.0, coords, 10, values, 0.5)).astype(int)
    dark, middle, bright = full[5, 2], full[5, 7], full[5, 12]
    assert len({tuple(colour) for colour in (dark, middle, bright)}) == 3
    assert abs(half - (full + 100) / 2).max() <= 1
    assert (full[5, 16] == 100).all()
    only = np.asarray(color_tiles(image, 1.0, coords[:1], 10, np.array([0.5]), 1.0))
    assert (only[5, 2] == middle).all()


def test_polygons():
    coords, attention = np.array([(0, 0), (100, 0), (0, 100)]), np.array([0.2, 0.7, 0.1])
    collection = tiles_geojson(coords, 99.5, attention)
    first, second, _ = collection["features"]
    assert second["geometry"]["coordinates"] == [
        [[100.0, 0.0], [199.5, 0.0], [199.5, 99.5], [100.0, 99.5], [100.0, 0.0]]
    ]
    assert second["properties"]["measurements"] == {"attention": pytest.approx(2.1), "rank": 1.0}
    assert second["properties"]["color"] != first["properties"]["color"]
    assert first["properties"]["objectType"] == "tile"


def test_on_white_and_on_the_slide(features, model, tmp_path):
    drawn = draw_heatmap(model, features, tmp_path / "white", max_size=80)
    white = np.asarray(Image.open(drawn.png))
    assert (white[0, 0] == 255).all()
    assert (white != 255).any()
    with open_slide_features(features) as file:
        size, tiles = (file.level0_width, file.level0_height), len(file)
        coords = file.coords
    assert len(json.loads(drawn.geojson.read_text())["features"]) == tiles
    pytest.importorskip("openslide", reason="slides need the [wsi] extra")
    Image.new("RGB", size, (0, 0, 200)).save(tmp_path / "slide.png")
    on_slide = draw_heatmap(model, features, tmp_path / "slide", slide=tmp_path / "slide.png", max_size=80)
    picture = np.asarray(Image.open(on_slide.png)).astype(int)
    assert picture.shape == white.shape
    assert picture[0, 0].tolist() == [0, 0, 200]
    # Where a tile lies, half of the slide shines through.
    x, y = ((coords[0] + 200) * 80 / max(size)).astype(int)
    assert picture[y, x, 2] != 200
    np.testing.assert_array_equal(on_slide.scores.attention, drawn.scores.attention)


def test_what_is_refused(features, model, tmp_path):
    draw_heatmap(model, features, tmp_path / "maps", max_size=50)
    with pytest.raises(FileExistsError, match="--overwrite"):
        draw_heatmap(model, features, tmp_path / "maps", max_size=50)
    draw_heatmap(model, features, tmp_path / "maps", max_size=50, overwrite=True)
    with pytest.raises(ValueError, match="opacity is 2"):
        draw_heatmap(model, features, tmp_path / "maps", opacity=2)
    with pytest.raises(FileNotFoundError, match="mkdir -p"):
        draw_heatmap(model, features, tmp_path / "no" / "maps")
    pytest.importorskip("openslide", reason="slides need the [wsi] extra")
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match=r"is 64 x 64 px, but the features come from one of"):
        draw_heatmap(model, features, tmp_path / "x", slide=tmp_path / "other.png")
