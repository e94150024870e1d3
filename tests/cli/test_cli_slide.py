"""`ssmamba slide-pretrain`, `slide-embed` and `slide-evaluate` from the outside: files, exit codes, plain errors."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

for package in ("accelerate", "tensorboard", "yaml", "h5py", "sklearn", "matplotlib"):
    pytest.importorskip(package, reason="slide models need the [train], [wsi] and [eval] extras")
pytestmark = pytest.mark.usefixtures("one_thread")

from ssmamba_models.data.features import read_slide_features  # noqa: E402
from ssmamba_models.data.slide_vectors import read_slide_vectors  # noqa: E402
from ssmamba_models.data.synthetic_slides import write_synthetic_slides  # noqa: E402
from ssmamba_models.slide import create_slide_encoder  # noqa: E402

TRAIN = ("--model", "test_gigassl", "--batch-size", 4, "--epochs", 1, "--workers", 0, "--device", "cpu")
EVALUATE = ("--folds", 2, "--repeats", 1, "--budgets", "4,all", "--draws", 10)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Twelve slides of eight patients, and labels.csv; not to be written in."""
    folder = tmp_path_factory.mktemp("slides") / "features"
    write_synthetic_slides(folder, patients=8, tiles=20, feature_dim=6, shift=3.0)
    return folder


def invoke(*arguments):
    from click.testing import CliRunner

    from ssmamba_models.cli.main import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    result = invoke("slide-pretrain", "--features", slides, "--out", out, *TRAIN, "--set", "view_args.tiles=3")
    assert result.stdout.startswith("3 steps, loss ")
    assert result.stdout.endswith(f"-> {out}/model.safetensors\n")
    return out


@pytest.fixture(scope="module")
def vectors(run, slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("vectors") / "slides.h5"
    result = invoke("slide-embed", "--run", run, "--features", slides, "--out", out, "--views", 4, "--tiles", 3)
    assert result.stdout == f"12 slides x 16 -> {out}\n"
    return out


class TestPretrain:
    def test_a_run_folder_is_made(self, run):
        assert sorted(os.listdir(run)) == [
            "checkpoints", "config.json", "config.yaml", "log.jsonl", "model.safetensors", "tensorboard",
        ]  # fmt: skip

    def test_resume_needs_the_folder_alone(self, run, ssmamba):
        result = ssmamba("slide-pretrain", "--resume", "--out", run, "--quiet")
        assert (result.exit_code, result.stdout) == (0, "")
        result = ssmamba("slide-pretrain", "--resume", "--out", run, "--lr", 0.5)
        assert result.exit_code == 2
        assert "lr: None, now 0.5" in result.stderr

    def test_a_config_is_taken_and_options_go_before_it(self, run, ssmamba, tmp_path):
        arguments = ("--config", run / "config.yaml", "--out", tmp_path / "run", "--seed", 3, "--quiet")
        result = ssmamba("slide-pretrain", *arguments)
        assert result.exit_code == 0, result.output
        text = (tmp_path / "run" / "config.yaml").read_text()
        assert "seed: 3" in text
        assert "tiles: 3" in text


class TestEmbed:
    def test_the_vectors_are_the_encoders_and_the_baselines_stand_beside(self, vectors, run, slides):
        found = read_slide_vectors(vectors)
        assert found.slides == tuple(sorted(path.stem for path in slides.glob("*.h5")))
        assert set(found.baselines) == {"mean_pool", "random_encoder"}
        encoder = create_slide_encoder("test_gigassl", 6, pretrained=run).eval()
        slide = read_slide_features(slides / f"{found.slides[5]}.h5")
        tiles, grid = torch.from_numpy(slide.features), torch.from_numpy(slide.tile_grid).float()
        expected = encoder.embed(tiles, grid, seed=0, views=4, tiles=3)
        assert torch.allclose(torch.from_numpy(found.embeddings[5]), expected, atol=1e-6)
        assert np.allclose(found.baselines["mean_pool"][5], slide.features.mean(axis=0), atol=1e-6)
        assert not np.allclose(found.baselines["random_encoder"], found.embeddings, atol=1e-3)

    def test_the_file_says_what_it_holds(self, vectors, run):
        attributes = read_slide_vectors(vectors).attributes
        said = json.loads((run / "config.json").read_text())
        assert attributes["weights_sha256"] == said["domain"]["sha256"]
        assert (attributes["model"], attributes["seed"]) == ("test_gigassl", 0)
        assert attributes["features_model"] == "synthetic"
        assert (attributes["dtype"], attributes["device"]) == ("float32", "cpu")
        assert (attributes["option_views"], attributes["option_tiles"]) == (4, 3)

    def test_the_same_bytes_again(self, vectors, run, slides, ssmamba, tmp_path):
        arguments = ("--run", run, "--features", slides, "--views", 4, "--tiles", 3, "--quiet")
        assert ssmamba("slide-embed", *arguments, "--out", tmp_path / "again.h5").exit_code == 0
        assert (tmp_path / "again.h5").read_bytes() == vectors.read_bytes()
        assert ssmamba("slide-embed", *arguments, "--out", tmp_path / "other.h5", "--seed", 1).exit_code == 0
        other = read_slide_vectors(tmp_path / "other.h5").embeddings
        assert not np.allclose(other, read_slide_vectors(vectors).embeddings)

    def test_all_tiles(self, run, slides, ssmamba, tmp_path):
        for seed in (0, 1):
            arguments = ("--out", tmp_path / f"{seed}.h5", "--tiles", "all", "--seed", seed)
            result = ssmamba("slide-embed", "--run", run, "--features", slides, *arguments)
            assert result.exit_code == 0, result.output
        one, other = (read_slide_vectors(tmp_path / f"{seed}.h5").embeddings for seed in (0, 1))
        assert np.array_equal(one, other)  # nothing is drawn

    def test_unreadable_files_are_listed_and_the_rest_is_embedded(self, run, slides, ssmamba, tmp_path):
        folder = shutil.copytree(slides, tmp_path / "some")
        (folder / "zero.h5").write_bytes(b"")
        result = ssmamba("slide-embed", "--run", run, "--features", folder, "--out", tmp_path / "v.h5")
        assert result.exit_code == 1
        assert "12 slides x 16" in result.stdout
        assert "zero.h5" in result.stderr
        again = ssmamba("slide-embed", "--run", run, "--features", slides, "--out", tmp_path / "v.h5")
        assert again.exit_code == 2
        assert "--overwrite" in again.stderr

    def test_features_of_another_kind(self, run, ssmamba, tmp_path):
        write_synthetic_slides(tmp_path / "wide", patients=2, tiles=10, feature_dim=7)
        result = ssmamba("slide-embed", "--run", run, "--features", tmp_path / "wide", "--out", tmp_path / "v.h5")
        assert result.exit_code == 2
        message = "'what the encoder was trained on' and 'slide_000_0' do not belong together: feature_dim"
        assert message in result.stderr
        assert not (tmp_path / "v.h5").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--tiles", "some"), "neither a number of tiles nor all"),
            (("--tiles", 0), "tiles is 0"),
            (("--run", "nowhere"), "'nowhere'"),
            (("--features", "nowhere"), "'nowhere' does not exist"),
            (("--out", "nowhere/v.h5"), "create it (mkdir -p)"),
        ],
    )
    def test_bad_input(self, run, slides, ssmamba, monkeypatch, tmp_path, options, message):
        monkeypatch.chdir(tmp_path)
        result = ssmamba("slide-embed", "--run", run, "--features", slides, "--out", "v.h5", *options)
        assert result.exit_code == 2
        assert message in result.stderr
        assert os.listdir(tmp_path) == []


class TestEvaluate:
    def test_a_report_is_made(self, vectors, slides, ssmamba, tmp_path):
        arguments = ("--embeddings", f"ours={vectors}", "--labels", slides / "labels.csv", "--out", tmp_path / "report")
        result = ssmamba("slide-evaluate", *arguments, *EVALUATE)
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert [line.split()[0] for line in lines[1:4]] == ["ours", "mean_pool", "random_encoder"]
        assert "all: 0." in lines[2] or "all: 1." in lines[2]
        assert lines[4] == f"wrote {tmp_path}/report/report.md"
        assert sorted(os.listdir(tmp_path / "report")) == ["plots", "report.json", "report.md"]

    def test_slides_left_out_are_named(self, vectors, slides, ssmamba, tmp_path):
        rows = (slides / "labels.csv").read_text().splitlines()
        (tmp_path / "labels.csv").write_text("\n".join([*rows[:-1], "elsewhere,positive,patient_099"]))
        files = ("--embeddings", vectors, "--labels", tmp_path / "labels.csv", "--out", tmp_path / "report")
        arguments = (*files, "--no-plots")
        refused = ssmamba("slide-evaluate", *arguments, *EVALUATE)
        assert refused.exit_code == 2
        assert "1 of the 12 slides" in refused.stderr
        result = ssmamba("slide-evaluate", *arguments, *EVALUATE, "--skip-missing", "--quiet")
        assert result.exit_code == 0, result.output
        assert "left out, a vector and no label: slide_007_1" in result.stderr
        assert "left out, a label and no vector: elsewhere" in result.stderr

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--labels", "none.csv"), "the table of labels 'none.csv' does not exist"),
            (("--budgets", "50,many"), "budget 'many'"),
            (("--embeddings", "none.h5"), "'none.h5' does not exist"),
            (("--embeddings", "=x.h5"), "is not [NAME=]FILE"),
            (("--embeddings", "slides=x.h5"), "two embeddings are called 'slides'"),
            (("--folds", 20), "too few for 20 folds"),
        ],
    )
    def test_bad_input(self, vectors, slides, ssmamba, monkeypatch, tmp_path, options, message):
        monkeypatch.chdir(tmp_path)
        arguments = ("--embeddings", vectors, "--labels", slides / "labels.csv", "--out", "report", *EVALUATE)
        result = ssmamba("slide-evaluate", *arguments, *options)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
        assert message in result.stderr
        assert os.listdir(tmp_path) == []
