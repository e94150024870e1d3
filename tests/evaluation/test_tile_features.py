"""Features are computed once, and used again only while nothing has changed."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.tile_files import read_features
from ssmamba_models.evaluation.model_choice import parse_model
from ssmamba_models.evaluation.tile_features import tile_features

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def folder(labelled_tiles, tmp_path):
    return shutil.copytree(labelled_tiles, tmp_path / "tiles")


def compute(folder, path, model="test_ssmamba@none", seed=0, img_size=32):
    encoder = parse_model(model).load(seed, img_size, "cpu")
    return tile_features(read_tiles(folder), encoder, path, workers=0, progress=False)


def test_a_second_run_reads_what_the_first_wrote(folder, tmp_path):
    first = compute(folder, tmp_path / "f.h5")
    written = os.stat(tmp_path / "f.h5").st_mtime_ns
    second = compute(folder, tmp_path / "f.h5")
    assert (first.reused, second.reused) == (False, True)
    assert os.stat(tmp_path / "f.h5").st_mtime_ns == written
    assert np.array_equal(first.features, second.features)
    assert first.places.tolist() == list(range(9))
    assert np.array_equal(first.features, read_features(tmp_path / "f.h5").features)


@pytest.mark.parametrize("change", [{"seed": 1}, {"img_size": 64}, {"model": "color_histogram"}])
def test_another_encoder_makes_them_anew(folder, tmp_path, change):
    first = compute(folder, tmp_path / "f.h5")
    other = compute(folder, tmp_path / "f.h5", **change)
    assert not other.reused
    assert not np.array_equal(first.features, other.features)


def test_a_tile_that_changed_makes_them_anew(folder, tmp_path):
    compute(folder, tmp_path / "f.h5")
    Image.new("RGB", (64, 64), "red").save(folder / "stroma" / "stroma_000.png")
    assert not compute(folder, tmp_path / "f.h5").reused


def test_a_damaged_file_is_made_anew(folder, tmp_path):
    first = compute(folder, tmp_path / "f.h5")
    (tmp_path / "f.h5").write_bytes((tmp_path / "f.h5").read_bytes()[:1000])
    again = compute(folder, tmp_path / "f.h5")
    assert not again.reused
    assert np.array_equal(first.features, again.features)


def test_unreadable_tiles_are_named_in_the_second_run_too(folder, tmp_path):
    (folder / "solid" / "solid_001.png").write_text("no image")
    for reused in (False, True):
        table = compute(folder, tmp_path / "f.h5")
        ((path, reason),) = table.unreadable
        assert (path, table.reused) == ("solid/solid_001.png", reused)
        assert "not an image" in reason
        assert len(table.features) == 8
        assert 4 not in table.places
    assert np.array_equal(table.rows(np.array([5, 8])), table.features[[4, 7]])
