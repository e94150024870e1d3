"""The examples that measure SGCL, Giga-SSL and PAMA run on synthetic tiles, and go on from what is done."""

import csv

import pytest
from PIL import Image

for package in ("h5py", "sklearn", "accelerate"):
    pytest.importorskip(package, reason="pretraining and its evaluation need the [train,eval,wsi] extras")

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,
]


@pytest.mark.parametrize(
    ("name", "table", "rows"),
    [
        ("sgcl_ablation", "report.md", ["sgcl", "self", "random"]),
        ("slide_ssl_on_mosaics", "slide_ssl.md", ["mean_pool", "random gigassl", "gigassl", "random pama", "pama"]),
    ],
)
def test_measured_on_mosaics(run, tmp_path, name, table, rows):
    out = run(name, "--quick", "--out", tmp_path / "o")
    written = (tmp_path / "o" / table).read_text()
    assert all(f"| {row} | " in written for row in rows)
    assert written in out
    # The same line again trains nothing anew, and gives the same table.
    again = run(name, "--quick", "--out", tmp_path / "o")
    assert "done" not in again
    assert (tmp_path / "o" / table).read_text() == written


def test_sgcl_beside_and_on_a_real_slide(run, tmp_path, data_root):
    slide = ["--slide", data_root / "slides" / "cmu-1-small-region.svs", "--slide-tile", 224]
    out = run("sgcl_ablation", "--quick", *slide, "--out", tmp_path / "o")
    with open(tmp_path / "o" / "tiles.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cut = [row for row in rows if row["path"].startswith("cut/")]
    assert {(row["label"], row["slide"]) for row in cut} == {("unlabelled", "cmu-1-small-region")}
    ends = {split: [int(row["y"]) for row in cut if row["split"] == split] for split in ("train", "val")}
    assert max(ends["train"]) < min(ends["val"])  # one end of the slide is held out
    assert "recall@8 of the tiles around" in out
    assert "| chance | 0." in out
    assert f"log({sum(row['split'] == 'train' for row in rows)})" in out
    alone = run("sgcl_ablation", "--quick", *slide, "--slide-alone", "--out", tmp_path / "alone")
    assert f"log({len(ends['train'])})" in alone


def test_a_slide_alone_must_be_given(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("sgcl_ablation", "--quick", "--slide-alone", "--out", tmp_path / "o")
    assert "--slide-alone needs --slide" in capsys.readouterr().err


def test_sgcl_positives(run, tmp_path):
    out = run("sgcl_positives", "--out", tmp_path / "p.jpg", "--anchors", 2, "--shown", 3, "--side", 20)
    assert all(f"{kind}: " in out for kind in ("spatial positives", "propagated positives", "hard negatives"))
    assert "same tissue, of any two tiles: " in out
    assert Image.open(tmp_path / "p.jpg").size == (20 + 10 + 3 * 60 + 2 * 10, 16 + 2 * 20 + 10)


def test_pama_attention(run, tmp_path):
    out = run("pama_attention", "--side", 100, "--anchors", 2)
    assert "slide_001_0.h5: " in out
    assert Image.open(tmp_path / "pama_attention.png").width > 250
