"""The pretraining example learns from tiles that it makes, and takes a folder and a configuration."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

for package in ("accelerate", "tensorboard", "yaml"):
    pytest.importorskip(package, reason="training needs the [train] extra")
pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_mamim.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the example in this process; returns what it printed."""

    def run(*arguments):
        spec = importlib.util.spec_from_file_location("pretrain_mamim", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["pretrain_mamim.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return run


def test_quick(run, tmp_path):
    out = run("--quick", "--out", tmp_path / "run")
    first, last = map(float, re.search(r"loss ([\d.]+) in the first epoch, ([\d.]+) in the last", out).groups())
    assert last < first
    assert "test_ssmamba, 48 features" in out
    assert len(list((tmp_path / "run" / "reconstructions").glob("*.png"))) == 2


def test_a_folder_and_a_configuration(run, labelled_tiles, tmp_path):
    settings = "{model: test_ssmamba, img_size: 64, batch_size: 3, epochs: 1, workers: 0}"
    (tmp_path / "c.yaml").write_text(settings)
    out = run("--data", labelled_tiles, "--config", tmp_path / "c.yaml", "--out", tmp_path / "run")
    assert "3 of 3 steps" in out


def test_it_asks_for_data(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--out", tmp_path / "run")
    assert "--data FOLDER, or --quick" in capsys.readouterr().err
