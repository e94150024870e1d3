"""`ssmamba mil` from the outside: files, exit codes, plain errors."""

from __future__ import annotations

import csv
import json
import os
import shutil

import pytest
from PIL import Image

pytest.importorskip("h5py", reason="multiple-instance learning needs the [mil] extra")
pytest.importorskip("sklearn", reason="multiple-instance learning needs the [mil] extra")
pytest.importorskip("matplotlib", reason="multiple-instance learning needs the [mil] extra")
pytestmark = pytest.mark.usefixtures("one_thread")

from ssmamba_models.data.synthetic_slides import write_synthetic_slides  # noqa: E402

QUICK = ("--aggregator", "mean", "--folds", 2, "--epochs", 2, "--lr", 0.01, "--draws", 20, "--device", "cpu")


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Twelve slides of eight patients; not to be written in."""
    folder = tmp_path_factory.mktemp("mil") / "features"
    write_synthetic_slides(folder, patients=8, tiles=20, feature_dim=6, shift=3.0)
    return folder


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory):
    from click.testing import CliRunner

    from ssmamba_models.cli.main import main

    out = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["mil", "train", "--features", slides, "--labels", slides / "labels.csv", "--out", out, *QUICK]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("mean on 12 slides of 8 held-out patients:\n  AUC       ")
    assert f"wrote {out}/report.md" in result.stdout
    return out


def test_a_run_folder_is_made(run):
    assert sorted(os.listdir(run)) == [
        "config.yaml", "fold-0", "fold-1", "plots", "predictions.csv", "report.json", "report.md", "slides.json",
        "weights.safetensors",
    ]  # fmt: skip
    assert sorted(os.listdir(run / "plots")) == ["confusion.png", "roc.png"]


def test_resume_needs_the_folder_alone(run, ssmamba):
    before = (run / "fold-0" / "fold.json").stat().st_mtime_ns
    result = ssmamba("mil", "train", "--resume", "--out", run, "--quiet", "--no-plots")
    assert (result.exit_code, result.output) == (0, "")
    assert (run / "fold-0" / "fold.json").stat().st_mtime_ns == before
    again = ssmamba("mil", "train", "--resume", "--out", run, "--quiet")
    assert (again.exit_code, sorted(os.listdir(run / "plots"))) == (0, ["confusion.png", "roc.png"])


def test_slides_left_out_are_named(slides, ssmamba, tmp_path):
    rows = (slides / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join([*rows[:-1], "elsewhere,positive,patient_099"]))
    arguments = ("mil", "train", "--features", slides, "--labels", tmp_path / "labels.csv", "--out", tmp_path / "run")
    result = ssmamba(*arguments, *QUICK)
    assert result.exit_code == 2
    assert "1 of the 12 slides" in result.stderr
    result = ssmamba(*arguments, *QUICK, "--skip-missing", "--quiet", "--no-plots")
    assert result.exit_code == 0, result.output
    assert "left out, features and no label: slide_007_1" in result.stderr
    assert "left out, a label and no features: elsewhere" in result.stderr
    report = (tmp_path / "run" / "report.md").read_text()
    assert "have features and no label: 1 slides (`slide_007_1`)" in report


def test_predict(run, slides, ssmamba, tmp_path):
    folder = tmp_path / "some"
    shutil.copytree(slides, folder)
    (folder / "zero.h5").write_bytes(b"")
    result = ssmamba("mil", "predict", run, "--features", folder, "--out", tmp_path / "p.csv", "--ensemble")
    assert result.exit_code == 1
    assert f"12 slides by 2 models -> {tmp_path / 'p.csv'}" in result.stdout
    assert "unreadable: " in result.stderr
    assert "zero.h5" in result.stderr
    with open(tmp_path / "p.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    again = ssmamba("mil", "predict", run, "--features", slides, "--out", tmp_path / "p.csv")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr


def test_predict_computes_in_what_it_is_asked_for(run, slides, ssmamba, tmp_path):
    tables = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / f"{precision}.csv"
        result = ssmamba("mil", "predict", run, "--features", slides, "--out", out, "--precision", precision)
        assert result.exit_code == 0, result.output
        tables.append(out.read_text())
    assert tables[0] != tables[1]


def test_a_slide_whose_name_is_not_utf8_is_listed_and_the_others_predicted(run, slides, ssmamba, tmp_path):
    folder = tmp_path / "some"
    shutil.copytree(slides, folder)
    os.rename(folder / "slide_001_0.h5", os.fsencode(folder) + b"/case\xe9.h5")
    result = ssmamba("mil", "predict", run, "--features", folder, "--out", tmp_path / "p.csv")
    assert result.exit_code == 1
    assert "is not valid UTF-8; rename the file" in result.stderr
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 12


def test_heatmap(run, slides, ssmamba, tmp_path):
    file = slides / "slide_001_0.h5"
    result = ssmamba("mil", "heatmap", run, "--features", file, "--out", tmp_path / "maps", "--max-size", 100)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("negative 0.")
    assert max(Image.open(tmp_path / "maps" / "slide_001_0.png").size) == 100
    tiles = json.loads((tmp_path / "maps" / "slide_001_0.geojson").read_text())["features"]
    assert 20 <= len(tiles) <= 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--labels", "l.csv", "--out", "r"), "features must be given"),
        (("train", "--features", "f", "--labels", "l.csv", "--out", "r"), "the table of labels 'l.csv' does not exist"),
        (("train", "--features", "f", "--labels", "l", "--out", "r", "--set", "lrr=1"), "did you mean lr?"),
        (("predict", "nowhere", "--features", "f", "--out", "p.csv"), "`ssmamba mil train` writes it"),
        (("heatmap", "nowhere", "--features", "f.h5", "--out", "h"), "the feature file 'f.h5' does not exist"),
    ],
)
def test_bad_input(ssmamba, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = ssmamba("mil", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert os.listdir(tmp_path) == []


def test_help_names_every_aggregator(ssmamba):
    from ssmamba_models.slide.aggregators import list_aggregators

    text = " ".join(ssmamba("mil", "train", "--help").output.split())
    assert all(name in text for name in list_aggregators())
