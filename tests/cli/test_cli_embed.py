"""`ssmamba embed`: exit codes, what is said on which stream, and what is left on the disk."""

import os
import shutil
import subprocess
import sys

import pytest

from ssmamba_models.data.tile_files import read_features

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--model", "test_ssmamba", "--img-size", 64, "--workers", 0)


def test_all_good(ssmamba, labelled_tiles, tmp_path):
    result = ssmamba("embed", labelled_tiles, "--out", tmp_path / "f.h5", *QUICK)
    assert result.exit_code == 0
    assert "9 tiles x" in result.stdout
    assert "tiles/s" in result.stdout
    assert "Warning: features come from random weights" in result.stderr
    assert len(read_features(tmp_path / "f.h5").paths) == 9


def test_quiet_says_nothing_but_the_warning(ssmamba, labelled_tiles, tmp_path):
    result = ssmamba("embed", labelled_tiles, "--out", tmp_path / "f.h5", *QUICK, "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")
    assert len(result.stderr.splitlines()) == 1


def test_unreadable_tiles_are_listed_and_the_rest_is_written(ssmamba, labelled_tiles, tmp_path):
    tiles = tmp_path / "tiles"
    shutil.copytree(labelled_tiles, tiles)
    (tiles / "stroma" / "stroma_001.png").write_text("no image")
    result = ssmamba("embed", tiles, "--out", tmp_path / "f.h5", *QUICK)
    assert result.exit_code == 1
    assert "unreadable: stroma/stroma_001.png: not an image" in result.stderr
    assert "1 of 9 tiles unreadable" in result.stderr
    assert len(read_features(tmp_path / "f.h5").paths) == 8


def test_existing_output(ssmamba, labelled_tiles, tmp_path):
    out = tmp_path / "f.h5"
    out.write_text("precious")
    result = ssmamba("embed", labelled_tiles, "--out", out, *QUICK)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert out.read_text() == "precious"
    assert ssmamba("embed", labelled_tiles, "--out", out, *QUICK, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}/none", "--out", "{tmp}/f.h5"], "does not exist"),
        (["{tmp}", "--out", "{tmp}/f.h5"], "no tile found"),
        (["{tiles}", "--out", "{tmp}/no/f.h5"], "mkdir -p"),
        (["{tiles}", "--out", "{tmp}/f.h5", "--model", "ssmamba_smal"], "unknown model 'ssmamba_smal'; did you mean"),
        (["{tiles}", "--out", ""], "--out, out=...) is empty"),
        (["{tiles}", "--out", "{tmp}/f.h5", "--device", "cuda:99"], "--device cpu"),
        (["{tiles}", "--out", "{tmp}/f.h5", "--device", "meta"], "--device cpu"),
        (["{tiles}", "--out", "{tmp}/f.h5", "--pretrained", "--model", "test_ssmamba"], "no published weights"),
        (["{tiles}", "--out", "{tmp}/f.h5", "--checkpoint", "{tmp}/m.pth"], "m.pth' does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(ssmamba, labelled_tiles, tmp_path, arguments, said):
    result = ssmamba("embed", *(text.format(tmp=tmp_path, tiles=labelled_tiles) for text in arguments))
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("--batch-size", 0), ("--workers", -1), ("--img-size", 0), ("--seed", -1), ("--seed", 10**23)],
)
def test_a_number_out_of_range_names_its_option(ssmamba, labelled_tiles, tmp_path, option, value):
    result = ssmamba("embed", labelled_tiles, "--out", tmp_path / "f.h5", *QUICK, option, value)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}': {value} is not in the range" in result.stderr
    assert os.listdir(tmp_path) == []


def test_the_largest_seed(ssmamba, labelled_tiles, tmp_path):
    result = ssmamba("embed", labelled_tiles, "--out", tmp_path / "f.h5", *QUICK, "--seed", 2**63 - 1)
    assert result.exit_code == 0, result.output
    assert read_features(tmp_path / "f.h5").attributes["seed"] == 2**63 - 1


def test_h5py_missing_is_said_before_anything_else(ssmamba, labelled_tiles, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    result = ssmamba("embed", labelled_tiles, "--out", tmp_path / "f.h5", *QUICK)
    assert result.exit_code == 2
    assert 'pip install "ssmamba-models[wsi]"' in result.stderr


def test_the_command_itself(labelled_tiles, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", "from ssmamba_models.cli.main import main; main()", "embed"]
        + [str(labelled_tiles), "--out", str(tmp_path / "f.h5"), *map(str, QUICK)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "9 tiles" in run.stdout
    assert os.listdir(tmp_path) == ["f.h5"]
