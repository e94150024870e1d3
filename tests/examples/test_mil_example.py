"""The MIL example runs on slides that it writes, and on features given."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "mil.py"

pytest.importorskip("h5py", reason="multiple-instance learning needs the [mil] extra")
pytest.importorskip("sklearn", reason="multiple-instance learning needs the [mil] extra")
pytest.importorskip("matplotlib", reason="multiple-instance learning needs the [mil] extra")
pytestmark = pytest.mark.usefixtures("one_thread")

from ssmamba_models.data.synthetic_slides import write_synthetic_slides  # noqa: E402


@pytest.fixture
def run_file(monkeypatch, capsys, tmp_path):
    def run_file(path, *arguments):
        spec = importlib.util.spec_from_file_location(f"{path.stem}_example", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [path.name, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        module.main()
        return capsys.readouterr().out

    return run_file


@pytest.fixture
def run(run_file):
    return lambda *arguments: run_file(EXAMPLE, "--aggregator", "mean", "--epochs", "2", *arguments)


def test_on_slides_that_it_writes(run, tmp_path):
    out = run()
    assert out.startswith("auc       ")
    assert (tmp_path / "mil" / "run" / "report.md").is_file()
    assert len(list((tmp_path / "mil").glob("slide_*.png"))) == 1


def test_on_features_given(run, tmp_path):
    write_synthetic_slides(tmp_path / "f", patients=8, tiles=20, feature_dim=6)
    out = run("--features", tmp_path / "f", "--folds", 2, "--out", tmp_path / "out")
    assert f"wrote {tmp_path / 'out' / 'run' / 'report.md'}" in out


@pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning")
def test_on_mosaics(run_file, tmp_path):
    example = EXAMPLE.with_name("mil_on_mosaics.py")
    out = run_file(example, "--quick", "--out", tmp_path / "m")
    table = (tmp_path / "m" / "aucs.md").read_text()
    assert "| abmil | " in table
    assert table.splitlines()[-1] in out
    assert (tmp_path / "m" / "heatmap" / "mosaic_001_0.png").is_file()
    # The same line again trains nothing anew, and gives the same table.
    run_file(example, "--quick", "--out", tmp_path / "m")
    assert (tmp_path / "m" / "aucs.md").read_text() == table
