"""Pretraining gives the same numbers however it is cut: into processes, parts, lives."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from ssmamba_models.engine import methods
from ssmamba_models.engine import pretrain as pretrain_module
from ssmamba_models.engine.config import load_config
from ssmamba_models.engine.methods import Method
from ssmamba_models.engine.optimisation import create_optimizer, create_schedule, parameter_groups
from ssmamba_models.engine.pretrain import PretrainConfig, build, pretrain, select_tiles
from ssmamba_models.engine.weights import load_weights, read_weights

for package in ("accelerate", "tensorboard", "yaml"):
    pytest.importorskip(package, reason="training needs the [train] extra")
pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {
    "model": "test_ssmamba",
    "img_size": 64,
    "batch_size": 4,
    "epochs": 3,
    "workers": 0,
    "log_every": 1,
    "lr": 1e-3,
}
PARTS = ("loss", "low", "high", "color", "cross")


def config_of(data, **changes):
    return PretrainConfig(data=str(data), **{**QUICK, **changes})


def run_of(data, out, *, resume=False, **changes):
    return pretrain(config_of(data, **changes), out, resume=resume, progress=False)


def log_of(run, event=None):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == event]


def curve_of(run, names=("step", *PARTS, "lr", "grad_norm")):
    return [[line[name] for name in names] for line in log_of(run)]


def weights_of(run):
    return read_weights(run / "weights.safetensors")[0]


def assert_same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def unbroken(labelled_tiles, tmp_path_factory):
    """A run of six steps, and what `pretrain` returned."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = run_of(labelled_tiles, out, reconstruct_every=2)
    torch.set_num_threads(threads)
    return out, result


class TestRunFolder:
    def test_log(self, unbroken):
        run, result = unbroken
        lines = log_of(run)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert [line["epoch"] for line in lines] == [1, 1, 2, 2, 3, 3]
        assert [line["images"] for line in lines] == [4, 8, 12, 16, 20, 24]
        for line in lines:
            parts = line["low"] + line["high"] + 0.5 * line["color"] + 0.3 * line["cross"]
            assert line["loss"] == pytest.approx(parts, rel=1e-5)
            assert {"grad_norm", "lr", "images_per_second", "feature_rank"} <= line.keys()
            assert 0 <= line["data_wait"] <= 1
        assert sorted(line["seconds"] for line in lines) == [line["seconds"] for line in lines]
        epochs = log_of(run, "epoch")
        assert [line["epoch"] for line in epochs] == [1, 2, 3]
        assert epochs[1]["loss"] == pytest.approx((lines[2]["loss"] + lines[3]["loss"]) / 2)
        assert (result.step, result.steps, result.stopped_by, result.last) == (6, 6, None, epochs[-1])

    def test_weights_are_those_of_a_plain_timm_model(self, unbroken, labelled_tiles):
        run, _ = unbroken
        model = timm.create_model("test_ssmamba", num_classes=5)
        metadata = load_weights(model, run)
        assert (metadata["model"], metadata["method"], metadata["img_size"]) == ("test_ssmamba", "mamim", "64")
        assert (metadata["step"], metadata["epochs"], metadata["num_classes"]) == ("6", "3", "0")
        assert metadata["data"] == select_tiles(config_of(labelled_tiles)).sha256()
        fresh, _ = build(config_of(labelled_tiles), select_tiles(config_of(labelled_tiles)))
        assert not torch.equal(model.stem.conv1.weight, fresh.encoder.stem.conv1.weight)

    def test_checkpoints_are_the_newest_and_data_alone(self, unbroken):
        run, _ = unbroken
        assert sorted(os.listdir(run / "checkpoints")) == ["step-00000004.pt", "step-00000006.pt"]
        state = torch.load(run / "checkpoints" / "step-00000004.pt", weights_only=True)
        assert (state["step"], state["epoch"], state["step_in_epoch"]) == (4, 2, 0)
        assert {"module", "optimizer", "schedule", "ema", "rng", "config"} <= state.keys()

    def test_reconstructions(self, unbroken):
        run, _ = unbroken
        assert sorted(os.listdir(run / "reconstructions")) == ["epoch-0002.png", "epoch-0003.png"]
        picture = Image.open(run / "reconstructions" / "epoch-0002.png")
        assert picture.size == (3 * 68, 8 * 68)
        # Of the masked column half is grey, of the input column nothing need be.
        grey = (128, 128, 128)
        masked = [pixel == grey for pixel in picture.crop((70, 2, 134, 66)).get_flattened_data()]
        assert 0.5 <= sum(masked) / len(masked) < 0.55

    def test_tensorboard(self, unbroken):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run, _ = unbroken
        board = EventAccumulator(str(run / "tensorboard")).Reload()
        assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
        assert board.Scalars("train/loss")[2].value == pytest.approx(log_of(run)[2]["loss"])
        assert [event.step for event in board.Images("reconstructions")] == [4, 6]

    def test_its_config_gives_the_same_run(self, unbroken, tmp_path):
        run, _ = unbroken
        config = load_config(PretrainConfig, run / "config.yaml")
        pretrain(config, tmp_path / "again", progress=False)
        assert curve_of(tmp_path / "again") == curve_of(run)
        assert_same_weights(tmp_path / "again", run)
        assert (tmp_path / "again" / "config.yaml").read_text() == (run / "config.yaml").read_text()


class TestSameNumbers:
    def test_with_workers(self, unbroken, labelled_tiles, tmp_path):
        run_of(labelled_tiles, tmp_path / "run", workers=2)
        assert curve_of(tmp_path / "run") == curve_of(unbroken[0])

    def test_in_parts(self, labelled_tiles, tmp_path):
        # The contrastive alignment draws its negatives from each part: it alone depends on the parts' size.
        for name, parts in (("whole", 1), ("parts", 2)):
            run_of(labelled_tiles, tmp_path / name, accumulate=parts, method_args={"alignment": "cosine"})
        for part, whole in zip(curve_of(tmp_path / "parts"), curve_of(tmp_path / "whole")):
            assert part == pytest.approx(whole, rel=2e-4)

    def test_another_seed_gives_others(self, unbroken, labelled_tiles, tmp_path):
        run_of(labelled_tiles, tmp_path / "run", seed=1, epochs=1)
        assert curve_of(tmp_path / "run")[0] != curve_of(unbroken[0])[0]

    def test_on_two_processes(self, labelled_tiles, tmp_path):
        tiles = shutil.copytree(labelled_tiles, tmp_path / "tiles")
        bad = ["glands/glands_001.png", "solid/solid_002.png", "stroma/stroma_000.png"]
        for path in bad:
            (tiles / path).write_text("no image")
        run_of(tiles, tmp_path / "one")
        launch(tiles, tmp_path / "two", processes=2)
        assert len(curve_of(tmp_path / "two")) == 6
        for two, one in zip(curve_of(tmp_path / "two"), curve_of(tmp_path / "one")):
            assert two == pytest.approx(one, rel=2e-4)
        # Each process meets some of them, and the first one tells of all.
        assert sorted(line["path"] for line in log_of(tmp_path / "two", "unreadable")) == bad
        state = torch.load(tmp_path / "two" / "checkpoints" / "step-00000006.pt", weights_only=True)
        assert len(state["rng"]) == 2
        assert not torch.equal(state["rng"][0]["torch"], state["rng"][1]["torch"])


def command_of(data, out, *options, **changes):
    settings = [f"--set={name}={value}" for name, value in {**QUICK, **changes}.items()]
    return ["pretrain", "--data", str(data), "--out", str(out), "--quiet", *settings, *options]


def launch(data, out, *options, processes, **changes):
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    module = ["-m", "ssmamba_models"]
    done = subprocess.run(
        [*script, *module, *command_of(data, out, *options, **changes)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


class Noisy(nn.Module):
    """A method whose loss draws from the global generator, so that a lost state of it shows in the curve."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, batch):
        noise = torch.rand(len(batch["image"]))
        return {"loss": (noise * self.encoder(batch["image"]).square().mean(1)).mean()}


class PlainViews:
    """A fixed crop with a little seeded noise."""

    def __init__(self, img_size: int, noise: float = 0.1):
        self.img_size, self.noise = img_size, noise

    def __call__(self, image, generator):
        pixels = torch.frombuffer(bytearray(image.resize((self.img_size,) * 2).tobytes()), dtype=torch.uint8)
        pixels = pixels.view(self.img_size, self.img_size, 3).permute(2, 0, 1) / 255
        return {"image": pixels + self.noise * torch.randn(pixels.shape, generator=generator)}


@pytest.fixture
def noisy(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "noisy", Method(Noisy, PlainViews))
    return {"method": "noisy", "drop_path_rate": 0.2}


class TestResume:
    @pytest.fixture
    def stop_after(self, monkeypatch):
        """Make the process get a signal during a step."""

        def arrange(step, sign=signal.SIGTERM):
            real = pretrain_module.Trainer._step

            def stepping(trainer, *arguments):
                if trainer.state.step + 1 == step:
                    os.kill(os.getpid(), sign)
                return real(trainer, *arguments)

            monkeypatch.setattr(pretrain_module.Trainer, "_step", stepping)
            return lambda: monkeypatch.setattr(pretrain_module.Trainer, "_step", real)

        return arrange

    @pytest.mark.parametrize(("step", "sign"), [(3, signal.SIGTERM), (4, signal.SIGINT)])
    def test_a_stopped_run_goes_on_bit_for_bit(self, labelled_tiles, tmp_path, stop_after, noisy, step, sign):
        settings = {**noisy, "ema_decay": 0.8}
        run_of(labelled_tiles, tmp_path / "whole", **settings)
        whole_again = stop_after(step, sign)
        stopped = run_of(labelled_tiles, tmp_path / "run", **settings)
        assert (stopped.step, stopped.stopped_by) == (step, sign)
        whole_again()
        rest = run_of(labelled_tiles, tmp_path / "run", resume=True, **settings)
        assert (rest.step, rest.stopped_by) == (6, None)
        names = ("step", "loss", "lr", "grad_norm")
        assert curve_of(tmp_path / "run", names) == curve_of(tmp_path / "whole", names)
        assert_same_weights(tmp_path / "run", tmp_path / "whole")
        means = [[line["loss"] for line in log_of(tmp_path / name, "epoch")] for name in ("run", "whole")]
        assert means[0] == means[1]

    def test_lines_after_the_checkpoint_are_not_doubled(self, unbroken, labelled_tiles, tmp_path):
        shutil.copytree(unbroken[0], tmp_path / "run")
        (tmp_path / "run" / "checkpoints" / "step-00000006.pt").unlink()
        with open(tmp_path / "run" / "log.jsonl", "a") as file:
            file.write('{"step": 7, "lo')
        run_of(labelled_tiles, tmp_path / "run", resume=True, reconstruct_every=2)
        assert curve_of(tmp_path / "run") == curve_of(unbroken[0])
        assert_same_weights(tmp_path / "run", unbroken[0])

    def test_a_damaged_checkpoint_is_passed_over(self, unbroken, labelled_tiles, tmp_path, capsys):
        shutil.copytree(unbroken[0], tmp_path / "run")
        newest = tmp_path / "run" / "checkpoints" / "step-00000006.pt"
        newest.write_bytes(newest.read_bytes()[:-5000])
        run_of(labelled_tiles, tmp_path / "run", resume=True, reconstruct_every=2)
        assert "step-00000006.pt' is damaged" in capsys.readouterr().err
        assert curve_of(tmp_path / "run") == curve_of(unbroken[0])
        assert torch.load(newest, weights_only=True)["step"] == 6

    def test_a_finished_run_has_nothing_to_do_but_its_weights(self, unbroken, labelled_tiles, tmp_path):
        shutil.copytree(unbroken[0], tmp_path / "run")
        (tmp_path / "run" / "weights.safetensors").unlink()
        result = run_of(labelled_tiles, tmp_path / "run", resume=True)
        assert (result.step, result.stopped_by) == (6, None)
        assert_same_weights(tmp_path / "run", unbroken[0])
        assert curve_of(tmp_path / "run") == curve_of(unbroken[0])

    def test_without_resume_a_run_is_left_alone(self, unbroken, labelled_tiles):
        before = (unbroken[0] / "log.jsonl").read_bytes()
        with pytest.raises(FileExistsError, match=r"--resume.*another --out"):
            run_of(labelled_tiles, unbroken[0])
        assert (unbroken[0] / "log.jsonl").read_bytes() == before

    def test_other_settings_are_named(self, unbroken, labelled_tiles):
        with pytest.raises(ValueError, match=r"lr: 0.001, now 0.5; weight_decay: 0.05, now 0.1\)"):
            run_of(labelled_tiles, unbroken[0], resume=True, lr=0.5, weight_decay=0.1, workers=1)

    def test_parts_are_no_matter_of_taste(self, unbroken, labelled_tiles):
        """They decide which tiles the contrastive alignment compares."""
        with pytest.raises(ValueError, match="accumulate: 1, now 2"):
            run_of(labelled_tiles, unbroken[0], resume=True, accumulate=2)

    def test_a_checkpoint_of_other_code_is_named(self, unbroken, labelled_tiles, tmp_path):
        shutil.copytree(unbroken[0], tmp_path / "run")
        newest = tmp_path / "run" / "checkpoints" / "step-00000006.pt"
        state = torch.load(newest, weights_only=True)
        del state["module"]["mask_token"]
        torch.save(state, newest)
        with pytest.raises(ValueError, match=r"step-00000006\.pt' was written by another version .*mask_token"):
            run_of(labelled_tiles, tmp_path / "run", resume=True)

    def test_machines_without_a_common_folder_are_noticed(self, unbroken, labelled_tiles, tmp_path, monkeypatch):
        shutil.copytree(unbroken[0], tmp_path / "run")
        monkeypatch.setattr(pretrain_module.Trainer, "_gather", lambda trainer, step: [step, 0])
        with pytest.raises(ValueError, match=r"different checkpoints in .*\(of steps 6, 0\).*all machines share"):
            run_of(labelled_tiles, tmp_path / "run", resume=True)

    def test_leftovers_of_a_killed_process_stop_nothing(self, labelled_tiles, tmp_path):
        """Killed while the first file was written, and later while the weights were."""
        run = tmp_path / "run"
        run.mkdir()
        (run / ".config.0badcafe.part.yaml").touch()
        run_of(labelled_tiles, run, epochs=1, reconstruct_every=1)
        left = [run / ".weights.0badcafe.part.safetensors", run / "reconstructions" / ".epoch-0001.0badcafe.part.png"]
        for path in left:
            path.write_bytes(b"half")
        run_of(labelled_tiles, run, epochs=1, reconstruct_every=1, resume=True)
        assert not list(run.rglob(".*"))

    def test_other_tiles_are_noticed(self, unbroken, labelled_tiles, tmp_path):
        shutil.copytree(labelled_tiles, tmp_path / "tiles")
        (tmp_path / "tiles" / "solid" / "solid_000.png").rename(tmp_path / "tiles" / "solid" / "other.png")
        shutil.copytree(unbroken[0], tmp_path / "run")
        with pytest.raises(ValueError, match="does not hold the tiles"):
            run_of(tmp_path / "tiles", tmp_path / "run", resume=True)


KILLED = """
import sys
from ssmamba_models.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(labelled_tiles, tmp_path):
    changes = {"epochs": 12, "checkpoint_steps": 1, "ema_decay": 0.5, "reconstruct_every": 4}
    run_of(labelled_tiles, tmp_path / "whole", **changes)
    moments = random.Random(0)
    for _ in range(3):
        life = live(labelled_tiles, tmp_path / "run", changes)
        # Somewhere in a step, a checkpoint, an export or a picture.
        wait_for_lines(life, tmp_path / "run" / "log.jsonl", moments.randint(1, 5))
        time.sleep(moments.uniform(0, 0.03))
        assert life.poll() is None, life.communicate()[1]
        life.kill()
        life.communicate()
    last = live(labelled_tiles, tmp_path / "run", changes)
    _, error = last.communicate()
    assert last.returncode == 0, error
    assert curve_of(tmp_path / "run") == curve_of(tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def live(data, out, changes):
    arguments = command_of(data, out, "--resume", **changes)
    return subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stderr=subprocess.PIPE, text=True)


def wait_for_lines(process, log, count):
    """Until `count` lines more than at the first look after the process has begun to write."""
    modified = log.stat().st_mtime_ns if log.exists() else 0
    while process.poll() is None and not (log.exists() and log.stat().st_mtime_ns > modified):
        time.sleep(0.005)
    before = log.read_text().count("\n")
    while process.poll() is None and log.read_text().count("\n") < before + count:
        time.sleep(0.005)


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


class TestOptimisation:
    def test_ema_is_what_is_exported(self, labelled_tiles, tmp_path):
        run_of(labelled_tiles, tmp_path / "run", ema_decay=0.999)
        state = torch.load(tmp_path / "run" / "checkpoints" / "step-00000006.pt", weights_only=True)
        exported = weights_of(tmp_path / "run")["stem.conv1.weight"]
        assert torch.equal(exported, state["ema"]["encoder.stem.conv1.weight"])
        assert not torch.equal(exported, state["module"]["encoder.stem.conv1.weight"])

    def test_what_is_decayed(self, labelled_tiles):
        config = config_of(labelled_tiles)
        module, _ = build(config, select_tiles(config))
        groups = parameter_groups(module, 0.05)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
        spared = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
        assert {f"encoder.{name}" for name in module.encoder.no_weight_decay()} <= spared
        assert {"mask_token", "encoder.stem.conv1.bias", "decoder.norm.weight"} <= spared
        assert "decoder.blocks.0.dms.scans.0.A_log" in spared
        assert {"encoder.stem.conv1.weight", "decoder.to_pixels.weight"} <= decayed
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        assert decayed | spared | frozen == set(names.values())

    def test_muon_turns_matrices_alone(self, labelled_tiles):
        config = config_of(labelled_tiles, optimizer="muon", model="ssmamba_tiny")
        module, _ = build(config, select_tiles(config))
        groups = create_optimizer(config, parameter_groups(module, 0.05)).param_groups
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        turned = {names[id(p)] for group in groups if not group["use_fallback"] for p in group["params"]}
        wanted = {"encoder.stem.conv2.weight", "encoder.stages.2.blocks.0.mlp.fc1.weight", "decoder.join.weight"}
        assert wanted <= turned
        rest = ("norm", "bias", "lpr", "A_log", "beta", ".D", "mask_token")
        assert not [name for name in turned if any(part in name for part in rest)]
        assert all(group["weight_decay"] for group in groups if not group["use_fallback"])
        trained = {id(p) for p in module.parameters() if p.requires_grad}
        assert trained == {id(p) for group in groups for p in group["params"]}

    def test_muon_moves_a_matrix_alike_in_all_directions(self, labelled_tiles):
        """And as far as AdamW would: 0.2 lr for each entry, root mean square."""
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(32, 64))
        config = config_of(labelled_tiles, optimizer="muon", lr=0.01, weight_decay=0.0)
        optimizer = create_optimizer(config, [{"params": [weight], "weight_decay": 0.0}])
        few = torch.randn(32, 64) * torch.logspace(0, -2, 32)[:, None]  # a gradient of few strong directions
        weight.grad = few
        optimizer.step()
        values = torch.linalg.svdvals(weight.detach())
        assert values[-1] / values[0] > 0.3 > 10 * torch.linalg.svdvals(few)[-1] / torch.linalg.svdvals(few)[0]
        assert weight.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)

    def test_muon_goes_on_where_it_was(self, labelled_tiles, tmp_path):
        """Stopped after the first epoch and resumed, it gives the unbroken run's numbers."""
        muon = {"optimizer": "muon", "reconstruct_every": None}
        run_of(labelled_tiles, tmp_path / "whole", **muon)
        run_of(labelled_tiles, tmp_path / "parts", **muon, keep_checkpoints=9)
        for name in ("step-00000004.pt", "step-00000006.pt"):
            (tmp_path / "parts" / "checkpoints" / name).unlink()
        run_of(labelled_tiles, tmp_path / "parts", **muon, keep_checkpoints=9, resume=True)
        assert curve_of(tmp_path / "parts") == curve_of(tmp_path / "whole")
        assert_same_weights(tmp_path / "parts", tmp_path / "whole")

    def test_a_timm_without_muon_is_named(self, labelled_tiles, monkeypatch):
        monkeypatch.delattr("timm.optim.muon")
        monkeypatch.setitem(sys.modules, "timm.optim.muon", None)
        with pytest.raises(ValueError, match="newer timm"):
            create_optimizer(config_of(labelled_tiles, optimizer="muon"), [{"params": [nn.Parameter(torch.zeros(1))]}])

    def test_schedule(self, labelled_tiles):
        config = config_of(labelled_tiles, epochs=10, warmup_epochs=2, min_lr=1e-5)
        optimizer = create_optimizer(config, [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.5}])
        schedule = create_schedule(config, optimizer, steps_per_epoch=5)
        rates = []
        for step in range(51):
            rates.append(optimizer.param_groups[0]["lr"] / 0.5)
            schedule.step_update(step + 1)
        assert rates[0] == pytest.approx(1e-4)
        assert rates[10] == pytest.approx(1e-3)
        assert rates[:11] == sorted(rates[:11])
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[30] == pytest.approx((1e-3 + 1e-5) / 2)
        assert rates[50] == pytest.approx(1e-5)

    def test_lr_grows_with_the_batch(self, labelled_tiles):
        assert config_of(labelled_tiles, lr=None, batch_size=512).peak_lr == pytest.approx(3e-4)
        assert config_of(labelled_tiles, batch_size=512).peak_lr == 1e-3

    def test_bf16(self, unbroken, labelled_tiles, tmp_path):
        run_of(labelled_tiles, tmp_path / "run", precision="bf16", epochs=1)
        coarse, exact = curve_of(tmp_path / "run", PARTS)[0], curve_of(unbroken[0], PARTS)[0]
        assert coarse != exact
        assert coarse == pytest.approx(exact, rel=0.02)
        assert weights_of(tmp_path / "run")["stem.conv1.weight"].dtype == torch.float32

    def test_clipping(self, labelled_tiles, tmp_path):
        run_of(labelled_tiles, tmp_path / "free", clip_grad=None, epochs=1)
        run_of(labelled_tiles, tmp_path / "clipped", clip_grad=1e-6, epochs=1)
        assert curve_of(tmp_path / "free")[0] == pytest.approx(curve_of(tmp_path / "clipped")[0])
        assert curve_of(tmp_path / "free")[1] != pytest.approx(curve_of(tmp_path / "clipped")[1], rel=1e-6)


class TestInit:
    def test_a_run(self, unbroken, labelled_tiles):
        config = config_of(labelled_tiles, init=str(unbroken[0]), seed=5)
        module, _ = build(config, select_tiles(config))
        assert torch.equal(module.encoder.stem.conv1.weight, weights_of(unbroken[0])["stem.conv1.weight"])

    @pytest.mark.parametrize(
        ("init", "error", "message"),
        [("nowhere", FileNotFoundError, "init is 'nowhere'"), ("pretrained", ValueError, "no published weights")],
    )
    def test_impossible(self, labelled_tiles, tmp_path, init, error, message):
        with pytest.raises(error, match=message):
            run_of(labelled_tiles, tmp_path / "run", init=init)
        assert not (tmp_path / "run").exists()


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
