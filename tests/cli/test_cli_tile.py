"""`ssmamba tile`: what it prints, its exit codes, what it refuses, and that `ssmamba pretrain` takes what it makes."""

import csv

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("h5py", reason="jobs on slides need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")
tifffile = pytest.importorskip("tifffile", reason="slides need the [wsi] extra")

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ("--mpp", 1, "--tile-size", 64, "--workers", 0)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Two slides of tissue all over, of 25 and 10 tiles."""
    folder = tmp_path_factory.mktemp("cli") / "slides"
    folder.mkdir()
    for name, height in (("case", 640), ("small", 256)):
        grain = np.random.default_rng(0).integers(-30, 30, (height, 640, 3))
        image = np.clip(np.array([200, 120, 170]) + grain, 0, 255).astype(np.uint8)
        resolution = {"resolution": (20_000, 20_000), "resolutionunit": 3}
        tifffile.imwrite(folder / f"{name}.tif", image, tile=(256, 256), photometric="rgb", **resolution)
    return folder


def rows(out):
    with open(out / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_job(ssmamba, slides, tmp_path):
    result = ssmamba("tile", slides, "--out", tmp_path / "tiles", *OPTIONS)
    assert result.exit_code == 0, result.output
    assert f"2 of 2 slides done -> {tmp_path / 'tiles' / 'manifest.csv'}" in result.stdout
    assert "35 tiles in " in result.stdout
    table = rows(tmp_path / "tiles")
    assert [list(row) for row in table[:1]] == [["path", "slide", "x", "y"]]
    assert len(table) == 35
    assert table[-1] == {"path": "small/4_1.png", "slide": "small", "x": "4", "y": "1"}
    assert Image.open(tmp_path / "tiles/small/4_1.png").size == (64, 64)


def test_pretrain_takes_what_it_makes(ssmamba, slides, tmp_path):
    pytest.importorskip("accelerate", reason="training needs the [train] extra")
    pytest.importorskip("sklearn", reason="SGCL needs the [train] extra")
    labels = tmp_path / "labels.csv"
    labels.write_text("slide,label,patient,split\ncase,tumour,p1,train\nsmall,normal,p2,val\n")
    tiles, run = tmp_path / "tiles", tmp_path / "run"
    made = ssmamba("tile", slides, "--out", tiles, *OPTIONS, "--labels", labels, "--format", "jpeg", "--quality", 90)
    assert made.exit_code == 0, made.output
    assert rows(tiles)[0] == {
        "path": "case/0_0.jpg",
        "slide": "case",
        "x": "0",
        "y": "0",
        "label": "tumour",
        "group": "p1",
        "split": "train",
    }
    options = ("--model", "test_ssmamba", "--img-size", 64, "--epochs", 1, "--batch-size", 5, "--workers", 0)
    trained = ssmamba("pretrain", "--method", "sgcl", "--data", tiles, "--out", run, *options, "--device", "cpu")
    assert trained.exit_code == 0, trained.output
    assert (run / "weights.safetensors").exists()


def test_failed_slides_make_exit_code_1(ssmamba, slides, tmp_path):
    (tmp_path / "bad.svs").write_text("no slide")
    result = ssmamba("tile", slides, tmp_path / "bad.svs", "--out", tmp_path / "tiles", *OPTIONS, "--quiet")
    assert result.exit_code == 1
    assert "failed: bad: " in result.stderr
    assert "1 of 3 slides failed; try them again with --retry-failed" in result.stderr
    assert result.stdout == ""
    assert len(rows(tmp_path / "tiles")) == 35


def test_dry_run(ssmamba, slides, tmp_path):
    result = ssmamba("tile", slides, "--out", tmp_path / "tiles", *OPTIONS, "--dry-run", "--quiet")
    assert result.exit_code == 0, result.output
    assert "case: pending, 25 tiles, level 0 at 0.5 um/px" in result.stdout
    assert "35 tiles to do" in result.stdout
    (tmp_path / "bad.svs").write_text("no slide")
    bad = ssmamba("tile", tmp_path / "bad.svs", "--out", tmp_path / "tiles", *OPTIONS, "--dry-run", "--quiet")
    assert bad.exit_code == 1
    assert "bad: failed, " in bad.stdout
    assert not (tmp_path / "tiles").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--overlap", 64), "the overlap must be 0 or more and smaller than the tile size"),
        (("--mpp-override", 0), "mpp_override"),
        (("--mpp-csv", "missing.csv"), "missing.csv"),
        (("--labels", "missing.csv"), "the table of labels 'missing.csv' does not exist"),
        (("--quality", 90), "give it with jpeg only"),
        (("--format", "webp"), "webp"),
        (("--shard", "0/2"), "the shards of 2 are 1/2 to 2/2"),
        (("--out", "missing/tiles"), "create it (mkdir -p)"),
    ],
)
def test_bad_input_has_exit_code_2(ssmamba, slides, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = ssmamba("tile", slides, "--out", tmp_path / "tiles", *OPTIONS, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "tiles").exists()


def test_another_geometry_is_refused(ssmamba, slides, tmp_path):
    assert ssmamba("tile", slides / "small.tif", "--out", tmp_path / "tiles", *OPTIONS).exit_code == 0
    result = ssmamba("tile", slides, "--out", tmp_path / "tiles", *OPTIONS, "--overlap", 8)
    assert result.exit_code == 2
    assert "overlap was 0, now 8" in result.stderr
    assert len(rows(tmp_path / "tiles")) == 10
