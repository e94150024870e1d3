"""Pretraining gives the same numbers however it is cut: into processes, parts, lives."""

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
from pretrain_cases import (
    QUICK,
    Noisy,
    PlainViews,
    assert_same_weights,
    config_of,
    curve_of,
    log_of,
    run_of,
    weights_of,
)

from ssmamba_models.engine import methods
from ssmamba_models.engine import pretrain as pretrain_module
from ssmamba_models.engine.config import load_config
from ssmamba_models.engine.methods import Method
from ssmamba_models.engine.pretrain import PretrainConfig, build, pretrain, select_tiles
from ssmamba_models.engine.weights import load_weights

for package in ("accelerate", "tensorboard", "yaml"):
    pytest.importorskip(package, reason="training needs the [train] extra")
pytestmark = pytest.mark.usefixtures("one_thread")


# The terms of MAMIM that have a teacher.
TAUGHT = {
    "alignment": "teacher",
    "feature_weight": 0.5,
    "cross_feature_weight": 0.5,
    "cell_size": 16,
    "teacher_momentum": 0.7,
}


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

    def test_a_teacher_knows_how_long_the_training_is(self, labelled_tiles):
        config = config_of(labelled_tiles, method_args=TAUGHT)
        tiles = select_tiles(config)
        teacher = build(config, tiles)[0].teacher
        assert teacher.steps == len(tiles) // 4 * 3
        assert teacher.momentum_at(teacher.steps) == 1

    def test_a_teacher_on_two_processes(self, labelled_tiles, tmp_path):
        run_of(labelled_tiles, tmp_path / "one", method_args=TAUGHT)
        changes = {f"method_args.{name}": value for name, value in TAUGHT.items()}
        launch(labelled_tiles, tmp_path / "two", processes=2, **changes)
        names = ("step", "loss", "feature", "cross_feature", "cross", "grad_norm")
        for two, one in zip(curve_of(tmp_path / "two", names), curve_of(tmp_path / "one", names)):
            assert two == pytest.approx(one, rel=2e-3)


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

    def test_a_teacher_goes_on_bit_for_bit(self, labelled_tiles, tmp_path, stop_after):
        settings = {
            "method_args": {**TAUGHT, "local_weight": 0.3},
            "view_args": {"local_crops": 1, "stain": 0.2, "jitter": 0.1, "gray": 0.3},
        }
        run_of(labelled_tiles, tmp_path / "whole", **settings)
        whole_again = stop_after(3)
        stopped = run_of(labelled_tiles, tmp_path / "run", **settings)
        assert stopped.step == 3
        whole_again()
        run_of(labelled_tiles, tmp_path / "run", resume=True, **settings)
        names = ("step", "loss", "feature", "cross_feature", "cross", "local", "grad_norm")
        assert curve_of(tmp_path / "run", names) == curve_of(tmp_path / "whole", names)
        states = [
            torch.load(tmp_path / name / "checkpoints" / "step-00000006.pt", weights_only=True)["module"]
            for name in ("run", "whole")
        ]
        taught = [name for name in states[0] if name.startswith("teacher.copies.encoder.")]
        assert taught
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not all(torch.equal(states[0][name], states[0][name.removeprefix("teacher.copies.")]) for name in taught)
        # The exported weights are the student's.
        exported = weights_of(tmp_path / "run")
        assert all(torch.equal(value, states[0][f"encoder.{name}"]) for name, value in exported.items())

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
