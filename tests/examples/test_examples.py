"""Each example runs on images that it makes, and on a folder given; small models keep that quick."""

import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run an example as a script would run, in this process; returns what it printed."""

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        module.main()
        return capsys.readouterr().out

    return run


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


def test_fine_tuning_needs_classes(run, labelled_tiles):
    with pytest.raises(SystemExit, match="one folder per class"):
        run("fine_tune_in_your_code", "--folder", labelled_tiles / "stroma", "--model", "test_ssmamba")
