"""SGCL in the training loop: the same numbers on two processes and after a stop, banks and clusters included."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import timm
import torch
import torch.multiprocessing as mp

from ssmamba_models.data.seeded import GlobalBatches, collate_seeded
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.engine import pretrain as pretrain_module
from ssmamba_models.engine.config import config_values
from ssmamba_models.engine.pretrain import PretrainConfig, build, pretrain, select_tiles
from ssmamba_models.engine.weights import load_weights, read_weights

for package in ("accelerate", "tensorboard", "yaml", "sklearn"):
    pytest.importorskip(package, reason="training needs the [train] extra")
pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {
    "method": "sgcl",
    "model": "test_ssmamba",
    "img_size": 32,
    "batch_size": 8,
    "epochs": 2,
    "workers": 0,
    "log_every": 1,
    "lr": 1e-3,
}
LOSSES = ("loss", "loss_self", "loss_spatial", "loss_crop", "positives", "propagated")


@pytest.fixture(scope="module")
def placed_tiles(tmp_path_factory):
    """Thirty synthetic tiles of 40 px in two slides of 15, and a third with one tile."""
    folder = write_synthetic_tiles(tmp_path_factory.mktemp("placed"), tiles_per_kind=10, size=40)
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    places = [("a", x, y) for y in range(3) for x in range(5)] + [("b", x, y) for y in range(2) for x in range(7)]
    rows = [f"{path},{slide},{x},{y}" for path, (slide, x, y) in zip(paths, [*places, ("lone", 0, 0)])]
    (folder / "manifest.csv").write_text("\n".join(["path,slide,x,y", *rows]))
    return folder


def config_of(data, **changes):
    return PretrainConfig(data=str(data), **{**QUICK, **changes})


def run_of(data, out, *, resume=False, **changes):
    return pretrain(config_of(data, **changes), out, resume=resume, progress=False)


def lines_of(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def curve_of(run, names=("step", *LOSSES, "spatial_weight", "lr", "grad_norm")):
    return [[line[name] for name in names] for line in lines_of(run)]


def checkpoint_of(run):
    newest = sorted((run / "checkpoints").glob("*.pt"))[-1]
    return torch.load(newest, weights_only=True)["module"]


@pytest.fixture(scope="module")
def unbroken(placed_tiles, tmp_path_factory):
    """A run of six steps in two epochs."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_of(placed_tiles, out)
    torch.set_num_threads(threads)
    return out


def test_what_a_run_writes(unbroken):
    assert not (unbroken / "reconstructions").exists()
    metadata = load_weights(timm.create_model("test_ssmamba", num_classes=0), unbroken)
    assert (metadata["method"], metadata["step"]) == ("sgcl", "6")
    assert not [name for name in read_weights(unbroken / "weights.safetensors")[0] if "rows" in name]
    lines = lines_of(unbroken)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [round(line["spatial_weight"], 4) for line in lines] == [0.0067] * 3 + [0.0174] * 3
    assert all(line["positives"] > 2 for line in lines)
    assert {"feature_rank", "feature_cosine"} <= lines[0].keys()


def test_the_checkpoint_holds_banks_and_clusters(unbroken):
    state = checkpoint_of(unbroken)
    assert state["bank.rows"].shape == (30, 128)
    assert state["corners.rows"].shape == (120, 128)
    assert state["miner.labels"].shape == (3, 30)
    assert state["miner.fitted_epoch"] == 1
    assert len(state["miner.labels"].unique()) == 3


def test_a_lone_tile_is_told_of(placed_tiles, tmp_path, capsys):
    run_of(placed_tiles, tmp_path / "run", epochs=1)
    assert "1 of 3 slides have a single tile (lone); it has no neighbours" in capsys.readouterr().err


# --- the same numbers


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_stopped_run_goes_on_bit_for_bit(placed_tiles, unbroken, tmp_path, monkeypatch, step):
    """In mid-epoch, at an epoch's end, in mid-epoch of clusters that were fitted anew."""
    real = pretrain_module.Trainer._step

    def stepping(trainer, *arguments):
        if trainer.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(pretrain_module.Trainer, "_step", stepping)
        assert run_of(placed_tiles, tmp_path / "run").step == step
    assert run_of(placed_tiles, tmp_path / "run", resume=True).step == 6
    assert curve_of(tmp_path / "run") == curve_of(unbroken)
    one, other = checkpoint_of(tmp_path / "run"), checkpoint_of(unbroken)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
def test_on_two_processes(placed_tiles, unbroken, tmp_path):
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    module = ["-m", "ssmamba_models"]
    settings = [f"--set={name}={value}" for name, value in QUICK.items()]
    command = ["pretrain", "--data", str(placed_tiles), "--out", str(tmp_path / "two"), "--quiet", *settings]
    done = subprocess.run([*script, *module, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(curve_of(tmp_path / "two")) == 6
    for two, one in zip(curve_of(tmp_path / "two"), curve_of(unbroken)):
        assert two == pytest.approx(one, rel=1e-3)
    two, one = checkpoint_of(tmp_path / "two"), checkpoint_of(unbroken)
    for name in ("bank.rows", "corners.rows", "features.rows"):
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)
    assert torch.equal(two["miner.labels"], one["miner.labels"])


def three_steps(process, processes, data, out):
    """Three steps of plain SGD under DDP, an epoch each; writes the losses and all that should be the same."""
    torch.set_num_threads(1)
    config = config_of(data, epochs=3)
    module, tiles = build(config, select_tiles(config))
    trained = module
    if processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{out}/store", rank=process, world_size=processes
        )
        trained = torch.nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 1e-3, momentum=0.9)
    losses = []
    for step, keys in enumerate(GlobalBatches(len(tiles), 8, 1, 0, process=process, processes=processes)):
        module.start_step(step, step)
        loss = trained(collate_seeded([tiles[key] for key in keys]).views)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    names = ("bank.rows", "corners.rows", "features.rows", "miner.labels", "miner.fitted_epoch")
    state = {name: module.state_dict()[name] for name in names}
    torch.save((torch.stack(losses), state), f"{out}/{processes}-{process}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hold_identical_banks_and_clusters(placed_tiles, tmp_path):
    three_steps(0, 1, placed_tiles, tmp_path)
    mp.spawn(three_steps, (2, placed_tiles, tmp_path), nprocs=2)
    whole, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert len(whole[0]) == 3
    assert int(first[1]["miner.fitted_epoch"]) == 2
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name]), name
        torch.testing.assert_close(value, whole[1][name], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close((first[0] + second[0]) / 2, whole[0], atol=1e-4, rtol=1e-4)


# --- settings and bad input


def test_the_recipe_is_the_default():
    config = PretrainConfig(data="tiles", method="sgcl")
    names = ("optimizer", "batch_size", "weight_decay", "clip_grad", "warmup", "peak_lr", "epochs")
    assert [getattr(config, name) for name in names] == ["sgd", 128, 1e-4, 1.0, 0, pytest.approx(0.015), 100]
    assert PretrainConfig(**config_values(config)) == config
    mamim = PretrainConfig(data="tiles")
    assert [getattr(mamim, name) for name in names[:4]] == ["adamw", 256, 0.05, 1.0]


def test_what_is_given_goes_before_the_recipe():
    config = PretrainConfig(data="tiles", method="sgcl", batch_size=64, clip_grad=None, warmup_epochs=5)
    assert (config.batch_size, config.clip_grad, config.warmup, config.peak_lr) == (64, None, 5, pytest.approx(0.0075))
    other = PretrainConfig(data="tiles", method="sgcl", optimizer="adamw")
    assert (other.batch_size, other.base_lr, other.weight_decay, other.clip_grad) == (128, 1.5e-4, 0.05, 1.0)


def test_sgd_has_classical_momentum(placed_tiles):
    from ssmamba_models.engine.optimisation import create_optimizer

    weight = torch.nn.Parameter(torch.zeros(1))
    config = config_of(placed_tiles, lr=0.1, weight_decay=0.0)
    optimizer = create_optimizer(config, [{"params": [weight]}])
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()
    assert weight.item() == pytest.approx(-0.1 * (1 + 1.9))


@pytest.mark.parametrize(
    "changes",
    [
        {"method_args": {"intra": False, "inter": False, "inner": False}},
        {"model": "resnet18", "img_size": 64},
        {"model": "vit_tiny_patch16_224", "img_size": 64, "method_args": {"inter": False}},
        {"accumulate": 2},
        {"ema_decay": 0.9, "precision": "bf16"},
    ],
    ids=["self_alone", "resnet18", "vit", "accumulate", "ema_bf16"],
)
def test_it_trains(placed_tiles, tmp_path, changes):
    result = run_of(placed_tiles, tmp_path / "run", epochs=1, **changes)
    assert result.step == 3
    if changes.get("method_args", {}).get("inner") is False:
        assert result.last["loss"] == result.last["loss_self"]
        assert result.last["loss_crop"] == 0


def test_an_unreadable_tile_is_replaced(placed_tiles, tmp_path):
    tiles = shutil.copytree(placed_tiles, tmp_path / "tiles")
    next(tiles.rglob("*.png")).write_text("no image")
    result = run_of(tiles, tmp_path / "run", epochs=1, batch_size=30)
    assert len(result.unreadable) == 1


def test_a_csv_will_do(placed_tiles, tmp_path):
    assert run_of(placed_tiles / "manifest.csv", tmp_path / "run", epochs=1, batch_size=30).step == 1


def test_tiles_in_other_places_are_noticed(placed_tiles, unbroken, tmp_path):
    tiles = shutil.copytree(placed_tiles, tmp_path / "tiles")
    text = (tiles / "manifest.csv").read_text()
    (tiles / "manifest.csv").write_text(text.replace(",lone,0,0", ",lone,1,0"))
    shutil.copytree(unbroken, tmp_path / "run")
    with pytest.raises(ValueError, match=r"does not hold the tiles .*\(their paths, places, labels"):
        run_of(tiles, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method_args": {"negatives": 31}}, "negatives is 31, but there are 30 tiles"),
        ({"method_args": {"hard_negatives": 5000}}, "hard_negatives is 5000, but there are 30 tiles"),
        ({"method_args": {"intraa": True}}, "did you mean intra"),
        ({"method_args": {"seed": 3}}, "unknown key 'seed'"),
        ({"view_args": {"gray": 2}}, "gray is 2"),
        ({"view_args": {"inner": False}}, "unknown key 'inner'"),
        ({"batch_size": 64}, "30 tiles are fewer than one batch"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(placed_tiles, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_of(placed_tiles, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_tiles_without_places(labelled_tiles, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest\.csv"):
        run_of(labelled_tiles, tmp_path / "run")
