"""What a pretraining says of tiles it cannot read, losses that diverge, full disks and settings that cannot be."""

import os
import shutil
import signal

import pytest
import torch
from PIL import Image
from pretrain_cases import Noisy, PlainViews, assert_same_weights, config_of, log_of, run_of, weights_of
from torch import nn

from ssmamba_models.engine import methods
from ssmamba_models.engine.methods import Method
from ssmamba_models.engine.pretrain import select_tiles

for package in ("accelerate", "tensorboard", "yaml"):
    pytest.importorskip(package, reason="training needs the [train] extra")
pytestmark = pytest.mark.usefixtures("one_thread")


class Diverging(Noisy):
    """Its loss or its gradient ceases to be finite at the fourth step."""

    def __init__(self, encoder: nn.Module, what: str = "loss"):
        super().__init__(encoder)
        self.what, self.calls = what, 0

    def forward(self, batch):
        self.calls += 1
        loss = self.encoder(batch["image"]).square().mean()
        if self.calls == 4:
            loss = loss * torch.nan if self.what == "loss" else loss + (loss - loss.detach()).sqrt()
        return {"loss": loss}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_diverging_run_stops_and_keeps_its_last_good_state(monkeypatch, labelled_tiles, tmp_path, what):
    monkeypatch.setitem(methods.METHODS, "diverging", Method(Diverging, PlainViews))
    with pytest.raises(ValueError, match=r"diverged at step 4.*0\.000\d+; .*step-00000003\.pt.*lower --lr") as caught:
        run_of(
            labelled_tiles,
            tmp_path / "run",
            method="diverging",
            method_args={"what": what},
            checkpoint_steps=1,
        )
    assert ("loss nan" in str(caught.value)) == (what == "loss")
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000002.pt", "step-00000003.pt"]
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-00000003.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["module"].values())
    assert all(torch.isfinite(value).all() for value in weights_of(tmp_path / "run").values())


def test_mamim_with_a_rate_that_is_too_high_diverges_clearly(labelled_tiles, tmp_path):
    with pytest.raises(ValueError, match=r"diverged at step \d+: loss nan, .*lower --lr"):
        run_of(labelled_tiles, tmp_path / "run", lr=10, warmup_epochs=0, clip_grad=None, epochs=6)


def test_a_contrast_needs_two_tiles(labelled_tiles, tmp_path):
    with pytest.raises(ValueError, match=r"over 1 tile has nothing to choose from.*--batch-size.*alignment=cosine"):
        run_of(labelled_tiles, tmp_path / "run", accumulate=4)


def test_no_room_for_a_checkpoint(monkeypatch, unbroken, labelled_tiles, tmp_path):
    """The kernel refuses to let a file grow, as a full disk does."""
    import resource

    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    (run / "checkpoints" / "step-00000006.pt").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*step-00000006\.pt.*needs about \d+ MB.*--resume"):
            run_of(labelled_tiles, run, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(run / "checkpoints") == ["step-00000004.pt"]
    run_of(labelled_tiles, run, resume=True)
    assert_same_weights(run, unbroken[0])


class TestUnreadable:
    @pytest.fixture
    def tiles(self, labelled_tiles, tmp_path):
        return shutil.copytree(labelled_tiles, tmp_path / "tiles")

    def test_replaced_and_told_once(self, tiles, tmp_path, capsys):
        (tiles / "solid" / "solid_001.png").write_text("no image")
        result = run_of(tiles, tmp_path / "run", epochs=4, batch_size=9)
        assert [path for path, _ in result.unreadable] == ["solid/solid_001.png"]
        told = log_of(tmp_path / "run", "unreadable")
        assert [(line["path"], "not an image" in line["reason"]) for line in told] == [("solid/solid_001.png", True)]
        assert capsys.readouterr().err.count("solid/solid_001.png") == 1
        assert result.step == 4

    def test_none(self, tiles, tmp_path):
        for path in tiles.rglob("*.png"):
            path.write_text("no image")
        with pytest.raises(ValueError, match=r"none of the 9 tiles"):
            run_of(tiles, tmp_path / "run")

    def test_flat_folder(self, labelled_tiles, tmp_path):
        assert run_of(labelled_tiles / "solid", tmp_path / "run", batch_size=3, epochs=1).step == 1


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"batch_size": 10}, "9 tiles are fewer than one batch of 10; use --batch-size 9"),
            ({"accumulate": 3}, r"batch_size is 4, expected a multiple of processes x accumulate = 1 x 3 = 3"),
            ({"model": "ssmamba_tinny"}, "ssmamba_tiny"),
            ({"model_args": {"nonsense": 1}}, "nonsense"),
            ({"model": "test_vit"}, "needs an ssmamba encoder"),
            ({"img_size": 65}, "img_size is 65, expected a multiple"),
            ({"device": "abacus"}, "device 'abacus' cannot be used"),
            ({"classes": ["lung"]}, "there is: glands, solid, stroma"),
            ({"split": "val"}, "there is: none"),
        ],
    )
    def test_before_anything_is_written(self, labelled_tiles, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            run_of(labelled_tiles, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()

    def test_no_data(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            run_of(tmp_path / "nowhere", tmp_path / "run")

    def test_one_tile(self, labelled_tiles, tmp_path):
        (tmp_path / "tiles").mkdir()
        shutil.copy(labelled_tiles / "solid" / "solid_000.png", tmp_path / "tiles")
        with pytest.raises(ValueError, match="1 tile is fewer than one batch of 4"):
            run_of(tmp_path / "tiles", tmp_path / "run")

    @pytest.mark.parametrize(
        ("place", "error", "message"),
        [
            ("nowhere/run", FileNotFoundError, "mkdir -p"),
            ("file", NotADirectoryError, "is a file"),
            ("folder", FileExistsError, "other files than a run's"),
        ],
    )
    def test_out(self, labelled_tiles, tmp_path, place, error, message):
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "precious").touch()
        with pytest.raises(error, match=message):
            run_of(labelled_tiles, tmp_path / place)


def test_classes_and_split(labelled_tiles, tmp_path):
    rows = ["path,label,split"]
    for number, path in enumerate(sorted(labelled_tiles.rglob("*.png"))):
        rows.append(f"{path.relative_to(labelled_tiles)},{path.parent.name},{'val' if number % 3 == 0 else 'train'}")
    shutil.copytree(labelled_tiles, tmp_path / "tiles")
    (tmp_path / "tiles" / "manifest.csv").write_text("\n".join(rows))
    tiles = select_tiles(config_of(tmp_path / "tiles", classes=["glands", "solid"]))
    assert set(tiles.labels) == {"glands", "solid"}
    assert set(tiles.splits) == {"train"}
    assert len(tiles) == 4


def test_a_worker_that_dies_is_named(monkeypatch, labelled_tiles, tmp_path):
    main = os.getpid()

    def die_in_worker(path):
        if os.getpid() == main:
            return Image.new("RGB", (64, 64))
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("ssmamba_models.data.seeded.read_tile", die_in_worker)
    with pytest.raises(OSError, match=r"process that reads tiles died.*--workers"):
        run_of(labelled_tiles, tmp_path / "run", workers=1)
