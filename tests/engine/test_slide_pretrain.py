"""Slide-level pretraining: the same numbers however it is cut, and plain words where the slides do not fit."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

for package in ("accelerate", "tensorboard", "yaml", "h5py"):
    pytest.importorskip(package, reason="slide pretraining needs the [train] and [wsi] extras")
pytestmark = pytest.mark.usefixtures("one_thread")

from safetensors.torch import load_file  # noqa: E402

from ssmamba_models.data.features import open_slide_features, write_slide_features  # noqa: E402
from ssmamba_models.data.slide_bags import read_slides  # noqa: E402
from ssmamba_models.data.synthetic_slides import write_synthetic_slides  # noqa: E402
from ssmamba_models.engine import slide_pretrain as module_under_test  # noqa: E402
from ssmamba_models.engine.slide_data import SeededSlides  # noqa: E402
from ssmamba_models.engine.slide_pretrain import SlidePretrainConfig, pretrain_slides  # noqa: E402
from ssmamba_models.slide import create_slide_encoder  # noqa: E402
from ssmamba_models.slide.slide_weights import load_slide_encoder, save_slide_encoder  # noqa: E402

QUICK = {"batch_size": 4, "epochs": 2, "workers": 0, "log_every": 1, "lr": 1e-3, "device": "cpu"}
METHODS = {
    "gigassl": {"model": "test_gigassl", "method_args": {"hidden_dim": 8, "out_dim": 8}},
    "pama": {
        "method": "pama",
        "model": "test_pama",
        "method_args": {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2},
    },
}


def config_of(features, method="gigassl", **changes):
    return SlidePretrainConfig(features=str(features), **{**QUICK, **METHODS[method], **changes})


def run_of(features, out, method="gigassl", *, resume=False, **changes):
    return pretrain_slides(config_of(features, method, **changes), out, resume=resume, progress=False)


def log_of(run, event=None):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == event]


def curve_of(run):
    return [[line[name] for name in ("step", "loss", "lr", "grad_norm")] for line in log_of(run)]


def assert_same_weights(one, other):
    one, other = (load_file(run / "model.safetensors") for run in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Eight slides of 12 to 18 tiles; not to be written in."""
    folder = tmp_path_factory.mktemp("slides") / "features"
    write_synthetic_slides(folder, patients=6, tiles=12, feature_dim=6)
    return folder


@pytest.fixture(scope="module", params=sorted(METHODS))
def unbroken(request, slides, tmp_path_factory):
    """The method, its run of four steps, and what `pretrain_slides` returned."""
    out = tmp_path_factory.mktemp("runs") / request.param
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = run_of(slides, out, request.param)
    torch.set_num_threads(threads)
    return request.param, out, result


def rewrite(path, features=None, **attributes):
    """A feature file again, with other features or attributes."""
    with open_slide_features(path) as file:
        stored = file.features[:] if features is None else features(file.features[:])
        coords, geometry, known = file.coords, dict(file.coords_attributes), dict(file.attributes)
    with write_slide_features(
        path, stored.shape[1], coords_attributes=geometry, attributes={**known, **attributes}, overwrite=True
    ) as writer:
        writer.append(stored, coords[: len(stored)])


class TestRun:
    def test_log_and_checkpoints(self, unbroken):
        _, run, result = unbroken
        lines = log_of(run)
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert [line["slides"] for line in lines] == [4, 8, 12, 16]
        assert all({"loss", "grad_norm", "lr", "slides_per_second", "feature_rank"} <= line.keys() for line in lines)
        assert (result.step, result.steps, result.stopped_by, result.noun) == (4, 4, None, "slide")
        assert sorted(os.listdir(run / "checkpoints")) == ["step-00000002.pt", "step-00000004.pt"]
        assert os.listdir(run / "tensorboard")

    def test_the_encoder_is_loaded_by_its_run_folder(self, unbroken, slides):
        method, run, _ = unbroken
        name = METHODS[method]["model"]
        encoder = create_slide_encoder(name, 6, pretrained=run)
        state = torch.load(run / "checkpoints" / "step-00000004.pt", weights_only=True)["module"]
        assert all(torch.equal(value, state[f"encoder.{key}"]) for key, value in encoder.state_dict().items())
        fresh = create_slide_encoder(name, 6).state_dict()
        assert any(not torch.equal(value, fresh[key]) for key, value in encoder.state_dict().items())

    def test_the_run_says_what_it_was_trained_on(self, unbroken, slides):
        method, run, _ = unbroken
        said = json.loads((run / "config.json").read_text())["metadata"]
        assert (said["method"], said["step"], said["slides"]) == (method, "4", 8)
        assert said["provenance"] == read_slides(slides).provenance
        assert said["slides_with_shared_augmentation"] == 0

    def test_with_workers(self, unbroken, slides, tmp_path):
        method, run, _ = unbroken
        run_of(slides, tmp_path / "run", method, workers=2)
        assert curve_of(tmp_path / "run") == curve_of(run)

    def test_without_a_cache(self, unbroken, slides, tmp_path):
        method, run, _ = unbroken
        run_of(slides, tmp_path / "run", method, cache_gb=0)
        assert curve_of(tmp_path / "run") == curve_of(run)

    def test_another_seed_gives_others(self, unbroken, slides, tmp_path):
        method, run, _ = unbroken
        run_of(slides, tmp_path / "run", method, seed=1, epochs=1)
        assert curve_of(tmp_path / "run")[0] != curve_of(run)[0]

    def test_starting_from_a_run(self, unbroken, slides, tmp_path):
        method, run, _ = unbroken
        config = config_of(slides, method, init=str(run), seed=5)
        module, _ = module_under_test.build_slides(config, read_slides(slides))
        trained = load_file(run / "model.safetensors")
        assert all(torch.equal(value, trained[name]) for name, value in module.encoder.state_dict().items())


@pytest.fixture
def stopped_run_of(monkeypatch):
    """`run_of` that is told to stop in its third step."""
    real = module_under_test.Trainer._step

    def stepping(trainer, *arguments):
        if trainer.state.step + 1 == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer, *arguments)

    def stopped(*arguments, **changes):
        with monkeypatch.context() as patched:
            patched.setattr(module_under_test.Trainer, "_step", stepping)
            return run_of(*arguments, **changes)

    return stopped


class TestResume:
    def test_a_stopped_run_goes_on_bit_for_bit(self, unbroken, slides, tmp_path, stopped_run_of):
        method, run, _ = unbroken
        stopped = stopped_run_of(slides, tmp_path / "run", method)
        assert (stopped.step, stopped.stopped_by) == (3, signal.SIGTERM)
        rest = run_of(slides, tmp_path / "run", method, resume=True)
        assert (rest.step, rest.stopped_by) == (4, None)
        assert curve_of(tmp_path / "run") == curve_of(run)
        assert_same_weights(tmp_path / "run", run)

    @pytest.mark.parametrize(("method", "arguments"), [("gigassl", {"embed_dim": 8}), ("pama", {"max_tiles": 12})])
    def test_where_the_first_weights_are_gone(self, method, arguments, slides, tmp_path, stopped_run_of):
        """The arguments that came with them are kept."""
        init = tmp_path / "init"
        save_slide_encoder(create_slide_encoder(METHODS[method]["model"], 6, **arguments), init)
        run_of(slides, tmp_path / "whole", method, init=str(init))
        stopped_run_of(slides, tmp_path / "run", method, init=str(init))
        init.rename(tmp_path / "moved")
        run_of(slides, tmp_path / "run", method, init=str(init), resume=True)
        assert curve_of(tmp_path / "run") == curve_of(tmp_path / "whole")
        assert_same_weights(tmp_path / "run", tmp_path / "whole")
        assert load_slide_encoder(tmp_path / "run").arguments == {"feature_dim": 6, **arguments}
        with pytest.raises(OSError, match=r"/init' is no folder with a config\.json"):
            run_of(slides, tmp_path / "new", method, init=str(init), resume=True)

    def test_a_run_killed_before_its_checkpoint_repeats_the_steps(self, unbroken, slides, tmp_path):
        """What SIGKILL leaves: an older checkpoint, newer lines, and weights that fit neither."""
        method, run, _ = unbroken
        killed = shutil.copytree(run, tmp_path / "run")
        (killed / "checkpoints" / "step-00000004.pt").unlink()
        with open(killed / "log.jsonl", "a") as file:
            file.write('{"step": 5, "lo')
        (killed / "model.safetensors").write_bytes(b"half")
        (killed / ".model.0badcafe.part.safetensors").touch()
        run_of(slides, killed, method, resume=True)
        assert curve_of(killed) == curve_of(run)
        assert_same_weights(killed, run)
        assert not list(killed.glob(".*"))

    def test_other_settings_and_other_slides_are_named(self, unbroken, slides, tmp_path):
        method, run, _ = unbroken
        with pytest.raises(ValueError, match=r"weight_decay: .*, now 0\.5\)"):
            run_of(slides, run, method, resume=True, weight_decay=0.5)
        other = shutil.copytree(slides, tmp_path / "slides")
        (other / "slide_000_0.h5").rename(other / "renamed.h5")
        copy = shutil.copytree(run, tmp_path / "run")
        with pytest.raises(ValueError, match=r"does not hold the slides that .* names, numbers of tiles"):
            run_of(other, copy, method, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_two_processes_give_the_curve_of_one(slides, tmp_path, method):
    """Batch statistics, negatives and hidden tiles are those of the global batch; one slide is unreadable."""
    folder = shutil.copytree(slides, tmp_path / "slides")
    rewrite(folder / "slide_001_0.h5", lambda features: np.full_like(features, np.nan))
    run_of(folder, tmp_path / "one", method, epochs=1)
    changes = {**QUICK, **METHODS[method], "epochs": 1}
    settings = [f"--set={name}={json.dumps(value)}" for name, value in changes.items()]
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    code = ["-m", "ssmamba_models"]
    command = ["slide-pretrain", "--features", folder, "--out", tmp_path / "two", "--quiet", *settings]
    done = subprocess.run([*script, *code, *map(str, command)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(curve_of(tmp_path / "two")) == 2
    for two, one in zip(curve_of(tmp_path / "two"), curve_of(tmp_path / "one")):
        assert two == pytest.approx(one, rel=1e-3)
    assert [line["path"] for line in log_of(tmp_path / "two", "unreadable")] == ["slide_001_0"]


class TestUnreadable:
    def test_a_slide_with_nan_is_replaced_and_told_once(self, slides, tmp_path, capsys):
        folder = shutil.copytree(slides, tmp_path / "slides")
        rewrite(folder / "slide_002_0.h5", lambda features: np.where(np.arange(6) == 2, np.inf, features))
        result = run_of(folder, tmp_path / "run", batch_size=8, epochs=3)
        assert [name for name, _ in result.unreadable] == ["slide_002_0"]
        assert "are NaN or infinite" in result.unreadable[0][1]
        assert capsys.readouterr().err.count("unreadable, replaced: 'slide_002_0'") == 1
        assert all(np.isfinite(line["loss"]) for line in log_of(tmp_path / "run"))

    def test_none_is_readable(self, slides, tmp_path):
        folder = shutil.copytree(slides, tmp_path / "slides")
        for path in folder.glob("*.h5"):
            rewrite(path, lambda features: np.full_like(features, np.nan))
        with pytest.raises(ValueError, match=r"none of the 8 slides in .* is readable \(first: "):
            run_of(folder, tmp_path / "run")


class TestData:
    def test_large_slides_show_some_of_their_tiles(self, slides):
        seen = []
        data = SeededSlides(read_slides(slides), lambda tiles, generator: seen.append(tiles), 0, max_tiles=5)
        for epoch in (0, 0, 1):
            data[epoch, 3]
        assert [len(tiles) for tiles in seen] == [5, 5, 5]
        assert torch.equal(seen[0].features, seen[1].features)
        assert not torch.equal(seen[0].features, seen[2].features)
        with open_slide_features(data.bags.bags[3].path) as file:
            stored = {tuple(row) for row in (file.coords / file.patch_size_level0).astype(np.float32).tolist()}
        assert {tuple(row) for row in seen[0].grid.tolist()} <= stored

    def test_bags_of_shared_augmentation_are_what_giga_ssl_sees(self, slides, tmp_path, capsys):
        folder = tmp_path / "bagged"
        folder.mkdir()
        for path in slides.glob("*.h5"):
            with (
                open_slide_features(path) as file,
                write_slide_features(
                    folder / path.name,
                    6,
                    coords_attributes=dict(file.coords_attributes),
                    attributes=dict(file.attributes),
                    bag_tiles=3,
                ) as writer,
            ):
                writer.append(file.features[:], file.coords)
                for bag in range(2):
                    writer.append_bag(np.full((3, 6), 100.0 + bag, np.float32), file.coords[:3])
        _, data = module_under_test.build_slides(config_of(folder), read_slides(folder))
        views = [data[epoch, 0].views["features"] for epoch in range(6)]
        assert set(torch.stack(views).unique().tolist()) == {100.0, 101.0}
        assert all(len(view.unique()) == 1 for pair in views for view in pair)
        # They stay in memory, or without a cache on the disk: with the same numbers.
        uncached = module_under_test.build_slides(config_of(folder, cache_gb=0.0), read_slides(folder))[1]
        assert torch.equal(uncached[0, 0].views["features"], views[0])
        data.bags.bags[0].path.rename(tmp_path / "away.h5")
        assert torch.equal(data[0, 0].views["features"], views[0])
        assert uncached[0, 0].unreadable
        (tmp_path / "away.h5").rename(data.bags.bags[0].path)
        run_of(folder, tmp_path / "run", epochs=1)
        assert "no bags of shared augmentation" not in capsys.readouterr().err
        said = json.loads((tmp_path / "run" / "config.json").read_text())["metadata"]
        assert said["slides_with_shared_augmentation"] == 8

    def test_slides_without_bags_are_told(self, slides, tmp_path, capsys):
        run_of(slides, tmp_path / "run", epochs=1)
        assert "8 of 8 slides have no bags of shared augmentation" in capsys.readouterr().err


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"method": "simclr"}, "known are: gigassl, pama"),
            ({"model": "gigassl_scn"}, "did you mean gigassl_scm"),
            ({"model_args": {"depth": 2}}, "has no argument 'depth'"),
            ({"method_args": {"temprature": 1}}, "did you mean temperature"),
            ({"view_args": {"tiles": 0}}, "tiles is 0"),
            ({"batch_size": 10}, "8 slides are fewer than one batch of 10; use --batch-size 8"),
            ({"method": "pama", "method_args": {}}, "expected a PAMA"),
            ({"max_tiles": 0}, "max_tiles is 0"),
            ({"batch_size": 4, "accumulate": 4}, "gigassl needs 2 slides in each"),
            ({"model_args": {"embed_dim": "wide"}}, "'wide', expected a whole number"),
            ({"init": "nowhere"}, "'nowhere'"),
        ],
    )
    def test_before_anything_is_written(self, slides, tmp_path, changes, message):
        settings = {**QUICK, **METHODS["gigassl"], **changes}
        with pytest.raises((ValueError, OSError), match=message):
            pretrain_slides(SlidePretrainConfig(features=str(slides), **settings), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    def test_slides_that_do_not_belong_together(self, slides, tmp_path):
        folder = shutil.copytree(slides, tmp_path / "width")
        rewrite(folder / "slide_003_1.h5", lambda features: features[:, :5])
        with pytest.raises(ValueError, match=r"do not belong together: feature_dim is 6 and 5"):
            run_of(folder, tmp_path / "run")
        folder = shutil.copytree(slides, tmp_path / "model")
        rewrite(folder / "slide_003_1.h5", model="another")
        with pytest.raises(ValueError, match=r"model is 'synthetic' and 'another'"):
            run_of(folder, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_no_coordinates(self, slides, tmp_path):
        import h5py

        folder = shutil.copytree(slides, tmp_path / "slides")
        with h5py.File(folder / "slide_000_0.h5", "r+") as file:
            del file["coords"]
        with pytest.raises(ValueError, match="has no data set 'coords'"):
            run_of(folder, tmp_path / "run")

    def test_no_slides(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            run_of(tmp_path / "nowhere", tmp_path / "run")

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_slides_of_one_tile_train(self, slides, tmp_path, method):
        folder = shutil.copytree(slides, tmp_path / "slides")
        for path in folder.glob("*.h5"):
            rewrite(path, lambda features: features[:1])
        assert run_of(folder, tmp_path / "run", method, epochs=1).unreadable == []
