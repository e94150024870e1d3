"""The ablation of MAMIM trains each variant, scores it, and goes on from what is done."""

import csv

import pytest

from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.synthetic import write_synthetic_tiles

for package in ("accelerate", "tensorboard", "yaml", "h5py", "sklearn"):
    pytest.importorskip(package, reason="training and its evaluation need the [train,eval,wsi] extras")

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,
]


@pytest.fixture
def split_tiles(tmp_path):
    """Synthetic tiles with a manifest.csv: each its own group, two thirds to train on."""
    folder = write_synthetic_tiles(tmp_path / "tiles", tiles_per_kind=16, size=64)
    with open(folder / "manifest.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "split"])
        for number, path in enumerate(sorted(path.relative_to(folder) for path in folder.rglob("*.png"))):
            writer.writerow([path.as_posix(), path.parent.name, path.stem, "val" if number % 3 == 2 else "train"])
    return folder


def test_two_variants(run, tmp_path):
    line = ["mamim_ablation", "--quick", "--only", "base", "--only", "one_scale", "--out", tmp_path / "o"]
    out = run(*line)
    assert all(f"| {name} | linear probe | " in out for name in ("base", "one_scale", "random", "color_histogram"))
    log = tmp_path / "o" / "base-0" / "log.jsonl"
    before = log.read_text()
    assert run(*line).split("# ")[-1] == out.split("# ")[-1]
    assert log.read_text() == before


def test_a_share_of_the_groups(run, split_tiles, tmp_path):
    run("mamim_ablation", "--quick", "--data", split_tiles, "--share", "0.5", "--only", "base", "--seeds", "0",
        "--no-report", "--out", tmp_path / "o")  # fmt: skip
    tiles, part = read_tiles(split_tiles), read_tiles(tmp_path / "o" / "tiles")
    assert part.splits.count("val") == tiles.splits.count("val")
    assert 0.4 < part.splits.count("train") / tiles.splits.count("train") < 0.6
    assert (tmp_path / "o" / "base-0" / "weights.safetensors").is_file()
