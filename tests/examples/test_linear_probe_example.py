"""The linear probe example runs on tiles that it draws and on a folder given."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "linear_probe.py"

pytest.importorskip("sklearn", reason="evaluation needs the [eval] extra")
pytest.importorskip("matplotlib", reason="evaluation needs the [eval] extra")
pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def run(*arguments):
        spec = importlib.util.spec_from_file_location("linear_probe_example", EXAMPLE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["linear_probe.py", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        module.main()
        return capsys.readouterr().out

    return run


def test_on_tiles_that_it_draws(run, tmp_path):
    out = run("--model", "test_ssmamba@none", "--size", 32)
    assert "encoder          macro-F1" in out
    assert "color_histogram  macro-F1" in out
    assert (tmp_path / "linear_probe" / "report.md").is_file()


def test_on_a_folder(run, labelled_tiles, tmp_path):
    out = run("--folder", labelled_tiles, "--model", "test_ssmamba@none", "--size", 32, "--out", tmp_path / "probe")
    assert f"wrote {tmp_path / 'probe' / 'report.md'}" in out
