"""A folder of tiles in, one file of features out: all of it, in order, or nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ssmamba_models.data.tile_files import read_features
from ssmamba_models.data.tiles import find_tiles
from ssmamba_models.engine import embed as embed_module
from ssmamba_models.engine.embed import embed_folder
from ssmamba_models.engine.encoder import load_encoder

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]

QUICK = {"model": "test_ssmamba", "img_size": 64, "workers": 0, "progress": False}


def test_features_are_those_of_each_tile_in_sorted_order(labelled_tiles, tmp_path):
    summary = embed_folder(labelled_tiles, tmp_path / "f.h5", batch_size=4, **QUICK)
    read = read_features(summary.out)
    found = find_tiles(labelled_tiles)
    assert read.paths == list(found.paths)
    assert read.labels == [path.split("/")[0] for path in found.paths]
    assert (summary.count, summary.embed_dim) == read.features.shape == (9, summary.embed_dim)
    encoder = load_encoder("test_ssmamba", img_size=64)
    for index in (0, 5, 8):
        image = Image.open(labelled_tiles / found.paths[index]).convert("RGB")
        alone = encoder.embed(encoder.transform(image)[None])[0].numpy()
        assert np.allclose(read.features[index], alone, atol=1e-4)


def test_the_file_says_where_it_comes_from(labelled_tiles, tmp_path):
    embed_folder(labelled_tiles, tmp_path / "f.h5", seed=3, **QUICK)
    attributes = read_features(tmp_path / "f.h5").attributes
    assert attributes["model"] == "test_ssmamba"
    assert (attributes["weights"], attributes["pretrained_tag"], attributes["seed"]) == ("random", "none", 3)
    assert attributes["input_size"] == [3, 64, 64]
    assert attributes["dtype"] == "float32"
    assert len(attributes["weights_sha256"]) == 64
    for name in ("mean", "std", "interpolation", "crop_pct", "torch_version", "timm_version"):
        assert name in attributes


def test_two_runs_are_equal_to_the_byte_with_and_without_workers(labelled_tiles, tmp_path):
    for name, workers in (("0.h5", 0), ("2.h5", 2)):
        embed_folder(labelled_tiles, tmp_path / name, batch_size=4, **{**QUICK, "workers": workers})
    assert (tmp_path / "0.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()


def test_a_manifest_decides_what_is_a_tile_and_a_label(labelled_tiles, tmp_path):
    shutil.copytree(labelled_tiles, tmp_path / "tiles")
    paths = find_tiles(labelled_tiles).paths[1:5]
    lines = [f"{path},{kind}" for path, kind in zip(paths, ("a", "b", "a", "b"))]
    (tmp_path / "tiles" / "manifest.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    read = read_features(embed_folder(tmp_path / "tiles", tmp_path / "f.h5", **QUICK).out)
    assert (read.paths, read.labels) == (list(paths), ["a", "b", "a", "b"])


def test_bf16(labelled_tiles, tmp_path):
    for name, precision in (("32.h5", "fp32"), ("16.h5", "bf16")):
        embed_folder(labelled_tiles, tmp_path / name, precision=precision, **QUICK)
    exact, coarse = read_features(tmp_path / "32.h5"), read_features(tmp_path / "16.h5")
    assert coarse.attributes["dtype"] == "bfloat16"
    assert np.allclose(exact.features, coarse.features, atol=0.2)


def test_any_timm_name(labelled_tiles, tmp_path):
    summary = embed_folder(labelled_tiles, tmp_path / "f.h5", model="test_vit", workers=0, progress=False)
    assert summary.embed_dim == 64


class TestUnreadable:
    @pytest.fixture
    def tiles(self, tmp_path):
        folder = tmp_path / "tiles"
        folder.mkdir()
        for index in range(5):
            Image.new("RGB", (40, 40), (index * 50, 100, 150)).save(folder / f"{index}.png")
        return folder

    def test_the_good_are_written_and_the_bad_are_named(self, tiles, tmp_path):
        (tiles / "1.png").write_bytes((tiles / "1.png").read_bytes()[:60])
        (tiles / "4.png").write_text("no image")
        summary = embed_folder(tiles, tmp_path / "f.h5", batch_size=2, **QUICK)
        assert [path for path, _ in summary.unreadable] == ["1.png", "4.png"]
        assert "not an image" in summary.unreadable[1][1]
        read = read_features(tmp_path / "f.h5")
        assert read.paths == ["0.png", "2.png", "3.png"]
        assert read.labels is None
        assert len(read.features) == summary.count == 3

    def test_a_shape_that_cannot_be_resized_does_not_stop_the_run(self, tiles, tmp_path):
        Image.new("L", (1, 40_000_000)).save(tiles / "1.png")
        summary = embed_folder(tiles, tmp_path / "f.h5", batch_size=2, **QUICK)
        ((path, reason),) = summary.unreadable
        assert (path, summary.count) == ("1.png", 4)
        assert reason.startswith("an image of 1 x 40000000 px cannot be transformed (")

    def test_none_readable_makes_no_file(self, tiles, tmp_path):
        for index in range(5):
            (tiles / f"{index}.png").write_text("no image")
        with pytest.raises(ValueError, match=r"none of the 5 tiles.*0\.png: not an image"):
            embed_folder(tiles, tmp_path / "f.h5", **QUICK)
        assert os.listdir(tmp_path) == ["tiles"]


class TestBadInput:
    """Each is found before a model is made."""

    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        def never(*arguments, **options):
            raise AssertionError("a model was made")

        monkeypatch.setattr(embed_module, "load_encoder", never)

    @pytest.mark.parametrize(("option", "value"), [("batch_size", 0), ("workers", -1), ("img_size", 0)])
    def test_counts(self, labelled_tiles, tmp_path, option, value):
        with pytest.raises(ValueError, match=f"{option} is {value}, expected"):
            embed_folder(labelled_tiles, tmp_path / "f.h5", **{**QUICK, option: value})

    def test_existing_output(self, labelled_tiles, tmp_path):
        (tmp_path / "f.h5").write_text("precious")
        with pytest.raises(FileExistsError, match="--overwrite"):
            embed_folder(labelled_tiles, tmp_path / "f.h5", **QUICK)
        assert (tmp_path / "f.h5").read_text() == "precious"

    def test_output_below_a_file(self, labelled_tiles, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="is a file"):
            embed_folder(labelled_tiles, tmp_path / "file" / "f.h5", **QUICK)

    def test_empty_folder(self, tmp_path):
        (tmp_path / "tiles").mkdir()
        with pytest.raises(ValueError, match="no tile found"):
            embed_folder(tmp_path / "tiles", tmp_path / "f.h5", **QUICK)


class BrokenEncoder:
    """An encoder as `load_encoder` returns it, whose model does what the test wants."""

    name, embed_dim, device = "broken", 4, torch.device("cpu")

    def __init__(self, answer):
        self.embed = answer
        self.transform = lambda image: torch.zeros(3, 8, 8)

    def provenance(self):
        return {}


def run_broken(monkeypatch, labelled_tiles, tmp_path, answer, **options):
    monkeypatch.setattr(embed_module, "load_encoder", lambda *arguments, **more: BrokenEncoder(answer))
    embed_folder(labelled_tiles, tmp_path / "f.h5", **{**QUICK, **options})


def test_features_that_are_not_finite_are_never_written(monkeypatch, labelled_tiles, tmp_path):
    def half_nan(images):
        features = torch.zeros(len(images), 4)
        features[1] = torch.nan
        return features

    with pytest.raises(ValueError, match=r"not finite \(first tile: glands/glands_001.png\)"):
        run_broken(monkeypatch, labelled_tiles, tmp_path, half_nan)
    assert os.listdir(tmp_path) == []


def test_out_of_memory_names_the_batch_size(monkeypatch, labelled_tiles, tmp_path):
    def too_much(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ValueError, match=r"batch of 5 tiles.*smaller --batch-size"):
        run_broken(monkeypatch, labelled_tiles, tmp_path, too_much, batch_size=5)
    assert os.listdir(tmp_path) == []


def test_ctrl_c_leaves_nothing_and_an_existing_output_untouched(monkeypatch, labelled_tiles, tmp_path):
    (tmp_path / "f.h5").write_text("precious")

    def interrupt(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_broken(monkeypatch, labelled_tiles, tmp_path, interrupt, overwrite=True)
    assert os.listdir(tmp_path) == ["f.h5"]
    assert (tmp_path / "f.h5").read_text() == "precious"


def test_a_worker_that_dies_is_named(monkeypatch, labelled_tiles, tmp_path):
    if sys.platform == "win32":
        pytest.skip("needs fork")
    main = os.getpid()

    def die_in_worker(path):
        assert os.getpid() != main
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("ssmamba_models.data.tiles.read_tile", die_in_worker)
    with pytest.raises(OSError, match=r"process that decodes tiles died.*--workers"):
        embed_folder(labelled_tiles, tmp_path / "f.h5", **{**QUICK, "workers": 1})
    assert os.listdir(tmp_path) == []


def test_an_exception_in_a_worker_is_not_blamed_on_memory(monkeypatch, labelled_tiles, tmp_path):
    def broken(self, index):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("ssmamba_models.data.tiles.TileDataset.__getitem__", broken)
    with pytest.raises(RuntimeError, match=r"in DataLoader worker process 0[\s\S]*a fault of ours"):
        embed_folder(labelled_tiles, tmp_path / "f.h5", **{**QUICK, "workers": 1})
    assert os.listdir(tmp_path) == []


SLOW_RUN = """
import signal

# A shell's background job ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
import sys, time
from ssmamba_models.engine import embed, encoder
real = encoder.Encoder.embed
def slowly(self, images):
    print("embedding", flush=True)
    time.sleep(0.2)
    return real(self, images)
encoder.Encoder.embed = slowly
from ssmamba_models.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_stopped_midway_leaves_no_output(labelled_tiles, tmp_path, sign):
    out = tmp_path / "f.h5"
    arguments = [labelled_tiles, "--out", out, "--model", "test_ssmamba", "--batch-size", 1, "--workers", 1]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, "embed", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(3):
        assert process.stdout.readline().strip() == "embedding"
    process.send_signal(sign)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[sign]
    time.sleep(0.1)
    assert not out.exists()
    if sign != signal.SIGKILL:
        assert os.listdir(tmp_path) == []


def test_real_tiles(data_root, tmp_path):
    tiles = data_root / "lc25000"
    subset = tmp_path / "tiles"
    for path in find_tiles(tiles).paths[::1500]:
        (subset / path).parent.mkdir(parents=True, exist_ok=True)
        (subset / path).symlink_to((tiles / path).resolve())
    summary = embed_folder(subset, tmp_path / "f.h5", model="test_ssmamba", workers=0, progress=False)
    read = read_features(summary.out)
    assert (summary.count, summary.unreadable) == (8, [])
    assert set(read.labels) <= {"colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc"}
    assert np.ptp(read.features, axis=0).max() > 0
