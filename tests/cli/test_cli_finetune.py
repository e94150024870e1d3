"""`ssmamba finetune` from the outside: files, exit codes, plain errors, and features of what it trained."""

import json
import os

import pytest
import yaml

for package in ("accelerate", "tensorboard", "torchmetrics"):
    pytest.importorskip(package, reason="training needs the [train] extra")
pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--model", "test_ssmamba", "--init", "none", "--img-size", 64, "--batch-size", 4, "--epochs", 1)
QUICK += ("--workers", 0, "--val-fraction", 0.34)


@pytest.fixture(scope="module")
def run(labelled_tiles, tmp_path_factory):
    from click.testing import CliRunner

    from ssmamba_models.cli.main import main

    out = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["finetune", "--data", labelled_tiles, "--out", out, *QUICK, "--quiet", "--classes", "glands,solid"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    return out


def test_a_run_folder_is_made(run):
    assert sorted(os.listdir(run)) == [
        "checkpoints",
        "config.yaml",
        "log.jsonl",
        "metrics.json",
        "predictions.csv",
        "tensorboard",
        "weights.safetensors",
    ]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["classes"], settings["val_fraction"], settings["mixup"]) == (["glands", "solid"], 0.34, 0.0)
    assert json.loads((run / "metrics.json").read_text())["classes"] == ["glands", "solid"]


def test_the_closing_line(ssmamba, labelled_tiles, tmp_path):
    result = ssmamba("finetune", "--data", labelled_tiles, "--out", tmp_path / "run", *QUICK, "--freeze-encoder")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("best epoch 1: accuracy ")
    assert str(tmp_path / "run" / "weights.safetensors") in result.stdout
    assert "3 classes; training on 6 tiles, validating on 3 tiles" in result.stderr


def test_embed_takes_the_run(run, ssmamba, labelled_tiles, tmp_path):
    pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
    from ssmamba_models.data.tile_files import read_features

    out = tmp_path / "f.h5"
    result = ssmamba("embed", labelled_tiles, "--model", "test_ssmamba", "--checkpoint", run, "--out", out)
    assert result.exit_code == 0, result.output
    assert read_features(out).features.shape == (9, 48)


def test_resume_needs_the_folder_alone(run, ssmamba):
    result = ssmamba("finetune", "--resume", "--out", run, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train-fraction", 2), "train_fraction is 2.0, expected"),
        (("--classes", "glands"), "all of one class, 'glands'"),
        (("--classes", "glands,bone"), "class 'bone'; there is: glands, solid, stroma"),
        (("--set", "label_smooting=0"), "did you mean label_smoothing?"),
        (("--init", "nowhere"), "init is 'nowhere'"),
        (("--init", "pretrained"), "no published weights"),
        (("--batch-size", 64), "fewer than one batch"),
    ],
)
def test_bad_input(ssmamba, labelled_tiles, tmp_path, options, message):
    result = ssmamba("finetune", "--data", labelled_tiles, "--out", tmp_path / "run", *QUICK, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_no_data(ssmamba, tmp_path):
    result = ssmamba("finetune", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "data must be given" in result.stderr
