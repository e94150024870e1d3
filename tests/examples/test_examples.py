"""Each example runs on images that it makes, and on a folder given; small models keep that quick."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_help(run, name, capsys):
    with pytest.raises(SystemExit) as stop:
        run(name, "--help")
    assert stop.value.code == 0
    assert f"python examples/{name}.py" in capsys.readouterr().out


def test_every_example_is_in_the_readme():
    text = (EXAMPLES / "README.md").read_text()
    assert all(path.name in text for path in EXAMPLES.glob("*.py"))


def test_timm_usage(run):
    out = run("timm_usage", "--model", "test_ssmamba")
    assert "map, stride 32      (1, 7, 7, " in out
    assert "logits (1, 3)" in out


def test_timm_usage_with_an_image(run, labelled_tiles):
    image = labelled_tiles / "solid" / "solid_000.png"
    assert "features            (1, " in run("timm_usage", "--model", "test_ssmamba", "--image", image)


def test_tile_features(run, tmp_path):
    pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
    out = run("tile_features", "--model", "test_ssmamba", "--out", tmp_path / "out")
    assert "36 tiles" in out
    assert "of the same class" in out
    assert (tmp_path / "out" / "tile_features.h5").exists()
    assert Image.open(tmp_path / "out" / "tile_neighbours.png").height == 3 * 168 + 8


def test_tile_features_of_a_folder_without_classes(run, labelled_tiles, tmp_path):
    pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
    out = run("tile_features", "--folder", labelled_tiles / "stroma", "--model", "test_ssmamba")
    assert "3 tiles" in out
    assert (tmp_path / "tile_neighbours.png").exists()


def test_fine_tuning(run):
    out = run("fine_tune_in_your_code", "--model", "test_ssmamba", "--size", "64", "--epochs", "2")
    assert "epoch 2: loss" in out


@pytest.fixture
def few_tiles(tmp_path, labelled_tiles):
    """Three classes of three tiles: fewer than a batch; to be spoiled at will."""
    return shutil.copytree(labelled_tiles, tmp_path / "few")


FINE_TUNE = ("fine_tune_in_your_code", "--model", "test_ssmamba", "--size", 64, "--epochs", 1, "--folder")


def test_fine_tuning_on_fewer_tiles_than_a_batch(run, few_tiles):
    assert "epoch 1: loss" in run(*FINE_TUNE, few_tiles)


def test_fine_tuning_skips_a_batch_of_which_no_tile_can_be_read(run, few_tiles):
    bad = few_tiles / "a_class_sorted_first"
    bad.mkdir()
    for index in range(4 * 16):  # every fourth is for validation: its first batch of 16 holds nothing else
        (bad / f"{index:02}.png").write_text("no image")
    assert "epoch 1: loss" in run(*FINE_TUNE, few_tiles)


def test_fine_tuning_where_no_tile_can_be_read(run, few_tiles):
    for path in few_tiles.rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(SystemExit, match="no tile can be read for training"):
        run(*FINE_TUNE, few_tiles)


def test_fine_tuning_on_a_single_tile(run, few_tiles):
    for path in sorted(few_tiles.rglob("*.png"))[1:]:
        path.unlink()
    with pytest.raises(SystemExit, match="two tiles or more"):
        run(*FINE_TUNE, few_tiles)


def test_fine_tuning_needs_classes(run, labelled_tiles):
    with pytest.raises(SystemExit, match="one folder per class"):
        run("fine_tune_in_your_code", "--folder", labelled_tiles / "stroma", "--model", "test_ssmamba")
