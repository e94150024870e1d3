"""The fine-tuning example on tiles that it draws, and on a folder with a manifest."""

import importlib.util
import sys
from pathlib import Path

import pytest

for package in ("accelerate", "tensorboard", "torchmetrics", "yaml"):
    pytest.importorskip(package, reason="training needs the [train] extra")
pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        spec = importlib.util.spec_from_file_location("finetune_example", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return run


def test_on_tiles_that_it_draws(run):
    out = run("--model", "test_ssmamba", "--epochs", 1)
    assert "best epoch 1: accuracy" in out
    assert "glands/glands_000.png is glands; predicted" in out


def test_on_a_folder_and_from_a_run(run, labelled_tiles, tmp_path):
    rows = ["path,label,split"]
    for number, path in enumerate(sorted(labelled_tiles.rglob("*.png")) * 2):
        link = tmp_path / "tiles" / f"{number}.png"
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(path)
        rows.append(f"{link.name},{path.parent.name},{'train' if number < 16 else 'val'}")
    (tmp_path / "tiles" / "manifest.csv").write_text("\n".join(rows))
    common = ("--folder", tmp_path / "tiles", "--model", "test_ssmamba", "--epochs", 1)
    run(*common, "--out", tmp_path / "one")
    assert "0.png is glands; predicted" in run(*common, "--init", tmp_path / "one", "--out", tmp_path / "two")
    assert (tmp_path / "two" / "metrics.json").exists()
