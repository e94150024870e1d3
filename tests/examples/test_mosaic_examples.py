"""The examples that measure SGCL, Giga-SSL and PAMA run on synthetic tiles, and go on from what is done."""

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
        ("sgcl_ablation", "ablation.md", ["sgcl", "self", "random"]),
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


def test_pama_attention(run, tmp_path):
    out = run("pama_attention", "--side", 100, "--anchors", 2)
    assert "slide_001_0.h5: " in out
    assert Image.open(tmp_path / "pama_attention.png").width > 250
