"""`ssmamba pretrain`: settings from three places, plain errors, exit codes that tell."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

for package in ("accelerate", "tensorboard"):
    pytest.importorskip(package, reason="training needs the [train] extra")
pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--model", "test_ssmamba", "--img-size", 64, "--batch-size", 4, "--epochs", 2, "--workers", 0, "--quiet")


@pytest.fixture(scope="module")
def run(labelled_tiles, tmp_path_factory):
    from click.testing import CliRunner

    from ssmamba_models.cli.main import main

    out = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["pretrain", "--data", labelled_tiles, "--out", out, *QUICK, "--set", "view_args.mask_ratio=0.75"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    return out


def test_a_run_folder_is_made(run):
    assert sorted(os.listdir(run)) == [
        "checkpoints",
        "config.yaml",
        "log.jsonl",
        "reconstructions",
        "tensorboard",
        "weights.safetensors",
    ]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["epochs"], settings["view_args"]["mask_ratio"], settings["weight_decay"]) == (2, 0.75, 0.05)


def test_embed_takes_the_run(run, ssmamba, labelled_tiles, tmp_path):
    pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
    out = tmp_path / "f.h5"
    result = ssmamba("embed", labelled_tiles, "--model", "test_ssmamba", "--checkpoint", run, "--out", out)
    assert result.exit_code == 0, result.output


def test_options_go_before_set_and_set_before_the_file(run, ssmamba, tmp_path):
    result = ssmamba(
        "pretrain", "--config", run / "config.yaml", "--out", tmp_path / "run", "--epochs", 1,
        "--set", "epochs=9", "--set", "weight_decay=0.1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (settings["epochs"], settings["weight_decay"], settings["img_size"]) == (1, 0.1, 64)
    assert "2 steps, loss" in result.stdout
    assert str(tmp_path / "run" / "weights.safetensors") in result.stdout


def test_an_existing_run(run, ssmamba, labelled_tiles):
    result = ssmamba("pretrain", "--data", labelled_tiles, "--out", run, *QUICK)
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert "another --out" in result.stderr


def test_resume_needs_the_folder_alone(run, ssmamba):
    result = ssmamba("pretrain", "--resume", "--out", run, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    result = ssmamba("pretrain", "--resume", "--out", run, "--lr", 0.01)
    assert result.exit_code == 2
    assert "lr: None, now 0.01" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lr", -1), "lr is -1.0, expected"),
        (("--set", "epoch=3"), "unknown key 'epoch' among the options; did you mean epochs?"),
        (("--set", "epochs"), "is not KEY=VALUE"),
        (("--config", "missing.yaml"), "'missing.yaml' does not exist"),
        (("--model", "ssmamba_tinny"), "ssmamba_tiny"),
        (("--batch-size", 64), "fewer than one batch"),
    ],
)
def test_bad_input(ssmamba, labelled_tiles, tmp_path, options, message):
    result = ssmamba("pretrain", "--data", labelled_tiles, "--out", tmp_path / "run", *QUICK, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_no_data(ssmamba, tmp_path):
    result = ssmamba("pretrain", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "data must be given" in result.stderr


def test_unreadable_tiles_are_counted(ssmamba, labelled_tiles, tmp_path):
    tiles = shutil.copytree(labelled_tiles, tmp_path / "tiles")
    (tiles / "solid" / "solid_000.png").write_text("no image")
    result = ssmamba("pretrain", "--data", tiles, "--out", tmp_path / "run", *QUICK, "--batch-size", 9)
    assert result.exit_code == 0
    assert "1 tile was unreadable" in result.stderr


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(labelled_tiles, tmp_path, sign):
    options = ["pretrain", "--data", labelled_tiles, "--out", tmp_path / "run", *QUICK, "--epochs", 5000]
    script = "import sys; from ssmamba_models.cli.main import main; main(sys.argv[1:])"
    log = tmp_path / "run" / "log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, options), "--set=workers=1", "--set=checkpoint_epochs=null"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.05)
    # To the whole group, its reader of tiles too, as a terminal or a batch system does.
    os.killpg(process.pid, sign)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + sign, error
    assert "with a checkpoint; go on with --resume" in error
    assert "Traceback" not in error
    assert len(os.listdir(tmp_path / "run" / "checkpoints")) == 1
