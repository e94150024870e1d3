"""Outlines enclose the tissue, in level-0 pixels, as QuPath reads them; thumbnails show them."""

import json

import numpy as np
import pytest
from PIL import Image

from ssmamba_models.wsi.contours import (
    TISSUE_COLOR,
    contours_geojson,
    ring_area,
    tissue_contours,
    write_geojson,
)
from ssmamba_models.wsi.drawing import draw_thumbnail, write_thumbnail
from ssmamba_models.wsi.grid import make_grid
from ssmamba_models.wsi.tissue import TissueMask

pytest.importorskip("contourpy", reason="outlines need the [wsi] extra")


@pytest.fixture
def mask():
    """A frame with an island in its hole, and a block at the slide's corner; 16 level-0 px per px."""
    pixels = np.zeros((60, 80), bool)
    pixels[10:40, 10:50] = True
    pixels[15:35, 15:45] = False
    pixels[22:28, 25:35] = True
    pixels[50:, 70:] = True
    return TissueMask(pixels, 16.0)


def area(contour):
    return abs(ring_area(contour.outer)) - sum(abs(ring_area(hole)) for hole in contour.holes)


def test_pieces_holes_and_islands(mask):
    contours = tissue_contours(mask)
    assert [len(contour.holes) for contour in contours] == [1, 0, 0]
    expected = np.array([30 * 40 - 20 * 30, 100, 60]) * 16**2
    assert [area(contour) for contour in contours] == pytest.approx(expected, rel=0.03)


def test_places_are_level_0_pixels_within_the_slide(mask):
    frame, corner, _ = tissue_contours(mask)
    assert frame.outer.min(axis=0).tolist() == [160, 160]
    assert frame.outer.max(axis=0).tolist() == [800, 640]
    assert corner.outer.min(axis=0).tolist() == [1120, 800]
    assert corner.outer.max(axis=0).tolist() == [1280, 960]


def test_rings_are_closed_and_wound_against_each_other(mask):
    for contour in tissue_contours(mask):
        for ring in contour.rings:
            assert np.array_equal(ring[0], ring[-1])
            assert len(ring) >= 4
        signs = [np.sign(ring_area(ring)) for ring in contour.rings]
        assert signs == [1] + [-1] * len(contour.holes)


def test_any_mask_is_enclosed():
    """The outlines, filled again, are the mask."""
    from matplotlib.path import Path

    pixels = np.random.default_rng(3).random((20, 25)) < 0.5
    x, y = np.meshgrid(np.arange(25) + 0.5, np.arange(20) + 0.5)
    centres = np.stack([x.ravel(), y.ravel()], axis=1)
    inside = np.zeros(len(centres), bool)
    for contour in tissue_contours(TissueMask(pixels, 1.0)):
        for ring in contour.rings:
            inside ^= Path(ring).contains_points(centres)
    assert np.array_equal(inside.reshape(20, 25), pixels)


def test_empty_and_full_masks():
    assert tissue_contours(TissueMask(np.zeros((5, 5), bool), 8.0)) == []
    (whole,) = tissue_contours(TissueMask(np.ones((5, 6), bool), 8.0))
    assert whole.outer.max(axis=0).tolist() == [48, 40]


def test_geojson(mask, tmp_path):
    path = tmp_path / "tissue.geojson"
    write_geojson(path, contours_geojson(tissue_contours(mask)))
    read = json.loads(path.read_text())
    assert read["type"] == "FeatureCollection"
    first = read["features"][0]
    assert (first["type"], first["geometry"]["type"]) == ("Feature", "Polygon")
    assert first["properties"]["objectType"] == "annotation"
    assert first["properties"]["classification"] == {"name": "Tissue", "color": list(TISSUE_COLOR)}
    outer, hole = first["geometry"]["coordinates"]
    assert outer[0] == outer[-1]
    assert len(hole) >= 4
    with pytest.raises(FileExistsError):
        write_geojson(path, {"type": "FeatureCollection", "features": []})
    assert json.loads(path.read_text()) == read


def test_thumbnail(mask, tmp_path):
    grid = make_grid((1280, 960), 0.5, 1.0, 80, mask=mask, min_tissue=0.5)
    image = np.full((240, 320, 3), 240, np.uint8)
    picture = draw_thumbnail(image, 4.0, tissue_contours(mask), grid)
    drawn = np.array(picture)
    assert (image == 240).all()
    # The frame's left edge lies at level-0 pixel 160, which is 40 here.
    assert (drawn[100, 38:42] == TISSUE_COLOR).all(axis=1).any()
    assert (drawn[200:, 100:250] == 240).all()
    for x, y in grid.coords[:3] // 4:
        assert (drawn[y : y + 41, x] != 240).any(axis=1).all()
    write_thumbnail(tmp_path / "s.png", picture)
    assert np.array_equal(np.array(Image.open(tmp_path / "s.png")), drawn)
