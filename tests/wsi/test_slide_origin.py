"""Slides that say where their scanned area begins: QuPath counts from there, feature files from level 0's corner."""

import json
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")
pytest.importorskip("contourpy", reason="outlines need the [wsi] extra")
pytest.importorskip("torchmil", reason="heatmaps need the [mil] extra")

from job_cases import FEATURES, disc, extract
from slide_files import make_pyramid, make_scn

from ssmamba_models.data.bags import open_bag
from ssmamba_models.data.convert import convert_features
from ssmamba_models.data.features import read_slide_features
from ssmamba_models.engine.mil_model import save_mil_model
from ssmamba_models.evaluation.heatmap import draw_heatmap
from ssmamba_models.slide.aggregators import create_aggregator
from ssmamba_models.wsi.reader import open_slide

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]

ORIGIN, SIZE = (300, 140), (1900, 1340)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """The same area: scanned from `ORIGIN` of a Leica slide, and alone."""
    folder = tmp_path_factory.mktemp("origin")
    make_scn(folder / "cropped.scn", SIZE, ORIGIN, 0.5, content=disc)
    area = (SIZE[0] - ORIGIN[0], SIZE[1] - ORIGIN[1])
    make_pyramid(folder / "plain.tif", area, 0.5, levels=(1,), content=disc, compression="jpeg")
    return folder


@pytest.fixture(scope="module")
def job(slides):
    out = slides / "job"
    assert extract(slides, out).done == ["cropped", "plain"]
    return out


def corners(path):
    """(n, 2) of all points of a GeoJSON file."""
    features = json.loads(path.read_text())["features"]
    return np.array([point for feature in features for ring in feature["geometry"]["coordinates"] for point in ring])


def test_the_slide_says_it(slides):
    with open_slide(slides / "cropped.scn") as slide:
        assert (slide.backend, slide.origin, slide.dimensions) == ("openslide", ORIGIN, SIZE)
    for backend in ("openslide", "tifffile"):
        with open_slide(slides / "plain.tif", backend=backend) as slide:
            assert slide.origin == (0, 0)


def test_outlines_are_where_qupath_shows_the_tissue(job):
    cropped, plain = (corners(job / "contours" / f"{name}.geojson") for name in ("cropped", "plain"))
    # The overviews' pixels, 16 of level 0 wide, lie differently.
    np.testing.assert_allclose(cropped.min(axis=0), plain.min(axis=0), atol=40)
    np.testing.assert_allclose(cropped.max(axis=0), plain.max(axis=0), atol=40)


def test_heatmaps_with_and_without_the_slide(slides, job, tmp_path):
    features = job / FEATURES / "cropped.h5"
    file = read_slide_features(features)
    assert file.origin == ORIGIN
    assert (file.coords.min(axis=0) >= ORIGIN).all()
    assert "origin_x" not in read_slide_features(job / FEATURES / "plain.h5").coords_attributes
    _, provenance = open_bag(features)
    width = file.features.shape[1]
    save_mil_model(
        tmp_path / "w.safetensors", create_aggregator("mean", width, 2), "mean", {}, ("no", "yes"), provenance
    )
    for name, slide in (("white", None), ("slide", slides / "cropped.scn")):
        drawn = draw_heatmap(tmp_path / "w.safetensors", features, tmp_path / name, slide=slide, max_size=80)
        assert np.array_equal(corners(drawn.geojson)[::5], file.coords - ORIGIN)


def test_conversion_keeps_it(job, tmp_path):
    layouts = ("ssmamba", "trident", "ssmamba")
    source = job / FEATURES
    for before, after in pairwise(layouts):
        out = tmp_path / after
        assert not convert_features(source, out, source_layout=before, target_layout=after).failed
        source = out
    assert read_slide_features(next(source.rglob("cropped.h5"))).origin == ORIGIN
