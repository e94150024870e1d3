"""Fine-tuning learns, keeps its best epoch, validates each tile once, and gives the same numbers however it is cut."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.seeded import GlobalBatches
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.engine import finetune as finetune_module
from ssmamba_models.engine.classifier import Classifier, inverse_frequencies
from ssmamba_models.engine.encoder import load_encoder
from ssmamba_models.engine.finetune import finetune, select_sets
from ssmamba_models.engine.finetune_config import FinetuneConfig
from ssmamba_models.engine.weights import read_weights

for package in ("accelerate", "tensorboard", "torchmetrics", "yaml"):
    pytest.importorskip(package, reason="training needs the [train] extra")
sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="compares with scikit-learn")
pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("glands", "solid", "stroma")
QUICK = {"model": "test_ssmamba", "init": "none", "img_size": 64, "batch_size": 12, "workers": 0, "log_every": 1}
QUICK |= {"epochs": 8, "lr": 1e-3, "layer_decay": None, "device": "cpu"}


def write_manifest(root, keep=lambda path, group: True):
    """Two tiles to a group, every fourth group for validation."""
    rows = ["path,label,group,split"]
    for kind in KINDS:
        for number, path in enumerate(sorted((root / kind).glob("*.png"))):
            group = number // 2
            if keep(path, group):
                rows.append(f"{kind}/{path.name},{kind},{kind}-{group},{'val' if group % 4 == 3 else 'train'}")
    (root / "manifest.csv").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Sixteen tiles of each kind: 36 to train on, 12 to validate with."""
    return write_manifest(write_synthetic_tiles(tmp_path_factory.mktemp("tiles"), tiles_per_kind=16, size=128))


@pytest.fixture
def own_tiles(tiles, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(tiles, tmp_path / "tiles")


def config_of(data, **changes):
    return FinetuneConfig(data=str(data), **{**QUICK, **changes})


def run_of(data, out, *, resume=False, **changes):
    return finetune(config_of(data, **changes), out, resume=resume, progress=False)


@pytest.fixture(scope="module")
def trained(tiles, tmp_path_factory):
    """A run of eight epochs, and what `finetune` returned."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = run_of(tiles, out)
    torch.set_num_threads(threads)
    return out, result


def epochs_of(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == "epoch"]


def numbers_of(run):
    names = ("loss", "grad_norm", "val_loss", "val_accuracy", "val_macro_f1", "val_macro_auc")
    return [[line[name] for name in names] for line in epochs_of(run)]


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


def predictions_of(run):
    with open(run / "predictions.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_weights(one, other):
    one, other = (read_weights(run / "weights.safetensors")[0] for run in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class TestTrained:
    def test_learns(self, trained):
        run, result = trained
        assert result.best["macro_f1"] > 0.75  # chance is a third
        assert epochs_of(run)[-1]["loss"] < epochs_of(run)[0]["loss"] - 0.2

    def test_the_best_epoch_is_kept(self, trained):
        run, result = trained
        scores = [(line["val_macro_f1"], -line["val_loss"]) for line in epochs_of(run)]
        assert result.best["epoch"] == 1 + scores.index(max(scores))
        assert metrics_of(run)["best"] == result.best
        assert metrics_of(run)["last"]["epoch"] == 8
        metadata = read_weights(run / "weights.safetensors")[1]
        assert metadata["selected"].startswith(f"epoch {result.best['epoch']}, the best by macro-F1")

    def test_validated_now_and_then(self, trained, tiles, tmp_path):
        """Every third epoch and the last one are, to the numbers that validating them all gives."""
        run_of(tiles, tmp_path / "run", validate_every=3)
        seen = {line["epoch"]: line["val_macro_f1"] for line in epochs_of(tmp_path / "run") if "val_macro_f1" in line}
        every = {line["epoch"]: line["val_macro_f1"] for line in epochs_of(trained[0])}
        assert seen == {epoch: every[epoch] for epoch in (3, 6, 8)}
        assert metrics_of(tmp_path / "run")["best"]["macro_f1"] == max(seen.values())

    def test_metrics_agree_with_sklearn_on_the_predictions(self, trained):
        run, _ = trained
        rows, best = predictions_of(run), metrics_of(run)["best"]
        labels, predicted = ([row[name] for row in rows] for name in ("label", "prediction"))
        probabilities = np.array([[float(row[f"probability_{kind}"]) for kind in KINDS] for row in rows])
        assert np.allclose(probabilities.sum(1), 1)
        assert [KINDS[place] for place in probabilities.argmax(1)] == predicted
        assert best["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
        assert best["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="macro"))
        area = sklearn_metrics.roc_auc_score(labels, probabilities, multi_class="ovr", labels=KINDS)
        assert best["macro_auc"] == pytest.approx(area)
        assert best["loss"] == pytest.approx(sklearn_metrics.log_loss(labels, probabilities, labels=KINDS))
        assert best["confusion_matrix"] == sklearn_metrics.confusion_matrix(labels, predicted, labels=KINDS).tolist()
        assert {name: row["support"] for name, row in best["per_class"].items()} == dict.fromkeys(KINDS, 4)

    def test_each_validation_tile_is_predicted_once(self, trained, tiles):
        val = read_tiles(tiles).select("val")
        rows = predictions_of(trained[0])
        assert [(row["path"], row["group"], row["label"]) for row in rows] == list(
            zip(val.paths, val.groups, val.labels)
        )

    def test_what_was_trained_on_is_told(self, trained):
        told = metrics_of(trained[0])
        assert told["train"] == {"tiles": 36, "groups": 18, "tiles_per_class": dict.fromkeys(KINDS, 12)}
        assert told["val"] == {"tiles": 12, "groups": 6, "tiles_per_class": dict.fromkeys(KINDS, 4)}
        assert told["classes"] == list(KINDS)

    def test_weights_are_those_of_a_plain_timm_model(self, trained, tiles):
        run, _ = trained
        model = timm.create_model("test_ssmamba", num_classes=3, checkpoint_path=str(run / "weights.safetensors"))
        encoder = load_encoder("test_ssmamba", checkpoint=run, img_size=64)
        assert torch.equal(encoder.model.stem.conv1.weight, model.stem.conv1.weight)
        row = predictions_of(run)[0]
        image = finetune_module.TileDataset(read_tiles(tiles).select("val"), encoder.transform)[0].image
        with torch.inference_mode():
            probabilities = model.eval()(image[None]).softmax(1)[0]
        assert probabilities.tolist() == pytest.approx([float(row[f"probability_{kind}"]) for kind in KINDS], abs=1e-4)

    def test_metadata(self, trained, tiles):
        metadata = read_weights(trained[0] / "weights.safetensors")[1]
        assert (metadata["model"], metadata["method"], metadata["img_size"]) == ("test_ssmamba", "finetune", "64")
        assert (metadata["num_classes"], json.loads(metadata["classes"])) == ("3", list(KINDS))
        assert metadata["data"] == select_sets(config_of(tiles))[0].sha256()

    def test_tensorboard(self, trained):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(trained[0] / "tensorboard")).Reload()
        values = [event.value for event in board.Scalars("epoch/val_macro_f1")]
        assert values == pytest.approx([line["val_macro_f1"] for line in epochs_of(trained[0])])


def stop_in_step_after(step, monkeypatch):
    """Send this process SIGTERM while it does the step after so many."""
    real = finetune_module.Trainer._step

    def stepping(trainer, *arguments):
        if trainer.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer, *arguments)

    monkeypatch.setattr(finetune_module.Trainer, "_step", stepping)


class TestSameNumbers:
    def test_resumed_with_dropping_mixing_and_averaging(self, tiles, tmp_path, monkeypatch):
        settings = {"epochs": 3, "drop_path_rate": 0.2, "mixup": 0.4, "cutmix": 1.0, "ema_decay": 0.7}
        run_of(tiles, tmp_path / "whole", **settings)
        stop_in_step_after(4, monkeypatch)
        stopped = run_of(tiles, tmp_path / "run", **settings)
        assert (stopped.training.step, stopped.training.stopped_by) == (5, signal.SIGTERM)
        monkeypatch.undo()
        run_of(tiles, tmp_path / "run", resume=True, **settings)
        assert numbers_of(tmp_path / "run") == numbers_of(tmp_path / "whole")
        assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
        assert_same_weights(tmp_path / "run", tmp_path / "whole")

    def test_the_best_survives_where_later_epochs_are_worse(self, trained, tiles, tmp_path):
        """Resumed at the end, nothing is left of the best epoch but what the checkpoint holds."""
        run = shutil.copytree(trained[0], tmp_path / "run")
        (run / "weights.safetensors").unlink()
        result = run_of(tiles, run, resume=True)
        assert result.best == trained[1].best
        assert_same_weights(run, trained[0])

    def test_resumed_where_the_first_weights_are_gone(self, trained, tiles, tmp_path, monkeypatch):
        init = shutil.copytree(trained[0], tmp_path / "init")
        run_of(tiles, tmp_path / "whole", init=str(init), epochs=2)
        stop_in_step_after(2, monkeypatch)
        run_of(tiles, tmp_path / "run", init=str(init), epochs=2)
        monkeypatch.undo()
        shutil.rmtree(init)
        run_of(tiles, tmp_path / "run", init=str(init), epochs=2, resume=True)
        assert_same_weights(tmp_path / "run", tmp_path / "whole")
        with pytest.raises(FileNotFoundError, match="a weight file or run folder that exists"):
            run_of(tiles, tmp_path / "new", init=str(init), epochs=2, resume=True)

    def test_with_workers(self, tiles, tmp_path):
        for workers in (0, 1):
            run_of(tiles, tmp_path / str(workers), workers=workers, epochs=2)
        assert numbers_of(tmp_path / "1") == numbers_of(tmp_path / "0")

    @pytest.mark.slow
    def test_on_two_processes(self, own_tiles, tmp_path):
        # Eleven tiles to validate with: the processes' shares differ by one.
        write_manifest(own_tiles, keep=lambda path, group: path.name != "solid_007.png")
        run_of(own_tiles, tmp_path / "one", epochs=2)
        settings = [f"--set={name}={json.dumps(value)}" for name, value in {**QUICK, "epochs": 2}.items()]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            + ["-m", "ssmamba_models", "finetune", "--quiet"]
            + ["--data", str(own_tiles), "--out", str(tmp_path / "two"), *settings],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        for two, one in zip(numbers_of(tmp_path / "two"), numbers_of(tmp_path / "one"), strict=True):
            assert two == pytest.approx(one, rel=2e-3)
        assert len(predictions_of(tmp_path / "two")) == 11
        one, two = metrics_of(tmp_path / "one")["best"], metrics_of(tmp_path / "two")["best"]
        assert two["confusion_matrix"] == one["confusion_matrix"]


class TestSets:
    def test_splits_of_the_data(self, tiles):
        train, val = select_sets(config_of(tiles))
        assert (len(train), len(val)) == (36, 12)
        assert set(train.groups).isdisjoint(val.groups)

    def test_groups_are_held_out_where_there_is_no_split(self, own_tiles):
        lines = (own_tiles / "manifest.csv").read_text().splitlines()
        (own_tiles / "manifest.csv").write_text("\n".join(line.rsplit(",", 1)[0] for line in lines))
        train, val = select_sets(config_of(own_tiles, val_fraction=0.25))
        assert (len(train), len(val)) == (36, 12)
        assert set(train.groups).isdisjoint(val.groups)
        assert select_sets(config_of(own_tiles, val_fraction=0.25, seed=9))[1] == val
        assert select_sets(config_of(own_tiles, val_fraction=0.25, split_seed=9))[1] != val

    def test_a_fraction_takes_whole_groups_of_each_class(self, tiles):
        train, val = select_sets(config_of(tiles, train_fraction=0.34))
        assert {kind: train.labels.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 4)
        assert len(set(train.groups)) == 6
        assert len(val) == 12

    def test_classes(self, tiles):
        train, val = select_sets(config_of(tiles, classes=("glands", "stroma")))
        assert train.classes == val.classes == ("glands", "stroma")


class TestBalance:
    @pytest.fixture
    def rare(self, own_tiles):
        """Twelve tiles of two kinds to train on, and two of the third."""
        return write_manifest(own_tiles, keep=lambda path, group: "solid" not in path.name or group in (0, 3))

    def test_the_sampler_draws_all_classes_equally_often(self, rare):
        train, _ = select_sets(config_of(rare))
        assert train.labels.count("solid") == 2
        weights = finetune_module._sampling_weights(train)
        batches = list(GlobalBatches(len(train), 13, 80, seed=0, weights=weights))
        assert batches == list(GlobalBatches(len(train), 13, 80, seed=0, weights=weights))
        drawn = [train.labels[index] for batch in batches for _, index, *_ in batch]
        for kind in KINDS:
            assert drawn.count(kind) / len(drawn) == pytest.approx(1 / 3, abs=0.04)

    def test_both_ways_are_trained(self, rare, tmp_path):
        losses = {}
        for balance in ("none", "loss", "sampler"):
            run = tmp_path / balance
            run_of(rare, run, balance=balance, epochs=1, batch_size=26)
            losses[balance] = epochs_of(run)[0]["loss"]
        assert len(set(losses.values())) == 3

    def test_weights_of_the_loss(self):
        weights = inverse_frequencies([0, 0, 0, 1], 2)
        assert weights.tolist() == pytest.approx([4 / 6, 2.0])
        logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        labels = torch.tensor([0, 1])
        network = torch.nn.Identity()
        found = Classifier(network, 0.0, weights)({"image": logits, "label": labels})
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        assert found["loss"].item() == pytest.approx((each * weights[labels]).mean().item())
        assert found["accuracy"].item() == 1

    def test_weights_under_mixup(self):
        class Half:
            def __call__(self, images, labels):
                return images, torch.full((len(labels), 2), 0.5)

        logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        module = Classifier(torch.nn.Identity(), 0.1, torch.tensor([1.0, 3.0]), Half())
        batch = {"image": logits, "label": torch.tensor([0, 1])}
        expected = 2 * -0.5 * logits.log_softmax(1).sum(1).mean()
        assert module.train()(batch)["loss"].item() == pytest.approx(expected.item())
        assert "accuracy" in module.eval()(batch)


class TestInit:
    def start(self, tiles, monkeypatch, tmp_path, **changes):
        """The network's weights as the training starts."""
        found = {}

        class Stop(Exception):
            pass

        def never(trainer):
            found.update({name: value.clone() for name, value in trainer.module.network.state_dict().items()})
            raise Stop

        monkeypatch.setattr(finetune_module.Trainer, "train", never)
        with pytest.raises(Stop):
            run_of(tiles, tmp_path / f"run{len(list(tmp_path.iterdir()))}", **changes)
        return found

    def test_none_depends_on_the_seed_alone(self, tiles, monkeypatch, tmp_path):
        one, again, other = (self.start(tiles, monkeypatch, tmp_path, seed=seed) for seed in (0, 0, 1))
        assert all(torch.equal(one[name], again[name]) for name in one)
        assert not torch.equal(one["stem.conv1.weight"], other["stem.conv1.weight"])

    @pytest.mark.parametrize("name", ["", "weights.safetensors"])
    def test_a_run_or_its_file(self, trained, tiles, monkeypatch, tmp_path, name):
        found = self.start(tiles, monkeypatch, tmp_path, init=str(trained[0] / name), classes=("glands", "solid"))
        source = read_weights(trained[0] / "weights.safetensors")[0]
        assert torch.equal(found["stem.conv1.weight"], source["stem.conv1.weight"])
        assert found["head.fc.weight"].shape[0] == 2

    def test_a_pretraining(self, tiles, monkeypatch, tmp_path):
        from ssmamba_models.engine.pretrain import PretrainConfig, pretrain

        quick = {"model": "test_ssmamba", "img_size": 64, "batch_size": 12, "epochs": 1, "workers": 0}
        pretrain(PretrainConfig(data=str(tiles), device="cpu", **quick), tmp_path / "pre", progress=False)
        found = self.start(tiles, monkeypatch, tmp_path, init=str(tmp_path / "pre"))
        source = read_weights(tmp_path / "pre" / "weights.safetensors")[0]
        assert all(torch.equal(found[name], value) for name, value in source.items() if name in found)
        assert found.keys() - source.keys() <= {"head.fc.weight", "head.fc.bias"}

    def test_a_published_classifier_of_other_classes_is_left_and_the_weights_say_their_model(
        self, trained, tiles, monkeypatch, tmp_path
    ):
        pytest.importorskip("huggingface_hub")
        from ssmamba_models.hub.publish import publish

        publish(trained[0], "lab/model", dry_run=tmp_path / "card")
        place = {"model": f"local-dir:{tmp_path / 'card'}", "init": "pretrained"}
        found = self.start(tiles, monkeypatch, tmp_path, **place)
        source = read_weights(trained[0] / "weights.safetensors")[0]
        assert torch.equal(found["stem.conv1.weight"], source["stem.conv1.weight"])
        assert found["head.fc.weight"].shape == source["head.fc.weight"].shape
        assert not torch.isclose(found["head.fc.weight"], source["head.fc.weight"]).any()
        monkeypatch.undo()
        run_of(tiles, tmp_path / "tuned", epochs=1, **place)
        assert read_weights(tmp_path / "tuned" / "weights.safetensors")[1]["model"] == "test_ssmamba"
        publish(tmp_path / "tuned", "lab/tuned", dry_run=tmp_path / "again")
        assert "model: local-dir:card\n" in (tmp_path / "again" / "README.md").read_text()

    def test_the_arguments_of_a_place_are_told(self, tiles, tmp_path):
        pytest.importorskip("huggingface_hub")
        from ssmamba_models.hub.publish import publish

        run_of(tiles, tmp_path / "first", epochs=1, model_args={"d_state": 2})
        publish(tmp_path / "first", "lab/model", dry_run=tmp_path / "card")
        run_of(tiles, tmp_path / "tuned", epochs=1, model=f"local-dir:{tmp_path / 'card'}", init="pretrained")
        done = publish(tmp_path / "tuned", "lab/tuned", dry_run=tmp_path / "again")
        found = timm.create_model(done.name, pretrained=True).state_dict()
        wanted = timm.create_model("test_ssmamba", d_state=2, num_classes=len(read_tiles(tiles).classes)).state_dict()
        assert [value.shape for value in found.values()] == [value.shape for value in wanted.values()]

    def test_another_architecture(self, trained, tiles, tmp_path):
        with pytest.raises(ValueError, match=r"are of test_ssmamba .*do not fit test_vit"):
            run_of(tiles, tmp_path / "run", model="test_vit", init=str(trained[0]))
        assert not (tmp_path / "run").exists()


class TestOptimisation:
    def test_layer_decay(self, tiles):
        config = config_of(tiles, layer_decay=0.5)
        network = timm.create_model("test_ssmamba", num_classes=3)
        groups = finetune_module._parameter_groups(config, network)
        scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
        assert len(scale) == len(list(network.parameters()))
        assert scale[id(network.head.fc.weight)] == 1
        assert scale[id(network.stem.conv1.weight)] == min(scale.values()) <= 0.5**4
        decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        spared = dict(network.named_parameters())
        assert all(decay[id(spared[name])] == 0 for name in network.no_weight_decay())
        assert decay[id(network.head.fc.weight)] == 0.05

    @pytest.mark.parametrize(
        ("init", "asked", "decay"), [("run", None, 0.65), ("none", None, None), ("none", 0.5, 0.5)]
    )
    def test_random_layers_are_not_held_still(self, tiles, init, asked, decay):
        config = config_of(tiles, init=init, layer_decay=asked)
        groups = finetune_module._parameter_groups(config, timm.create_model("test_ssmamba", num_classes=3))
        if decay is None:
            assert groups is None
        else:
            assert sorted({group["lr_scale"] for group in groups})[-2] == pytest.approx(decay)

    def test_a_frozen_encoder_stays(self, trained, tiles, tmp_path):
        run_of(tiles, tmp_path / "run", init=str(trained[0]), freeze_encoder=True, epochs=1, layer_decay=0.65)
        before, after = (read_weights(run / "weights.safetensors")[0] for run in (trained[0], tmp_path / "run"))
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == {"head.fc.weight", "head.fc.bias"}

    def test_any_timm_model_and_bf16(self, tiles, tmp_path):
        result = run_of(tiles, tmp_path / "run", model="test_vit", epochs=1, precision="bf16", layer_decay=0.65)
        assert result.best["epoch"] == 1
        assert load_encoder("test_vit", checkpoint=tmp_path / "run", img_size=64).embed_dim == 64


class TestUnreadable:
    def test_are_reported_and_skipped(self, own_tiles, tmp_path, capsys):
        for name in ("solid_000", "solid_007"):  # one to train on, one to validate with
            (own_tiles / "solid" / f"{name}.png").write_text("no image")
        result = run_of(own_tiles, tmp_path / "run", epochs=2, batch_size=36)
        assert [path for path, _ in result.training.unreadable] == ["solid/solid_000.png"]
        assert metrics_of(tmp_path / "run")["unreadable_val"].keys() == {"solid/solid_007.png"}
        assert len(predictions_of(tmp_path / "run")) == 11
        assert result.best["per_class"]["solid"]["support"] == 3
        error = capsys.readouterr().err
        assert error.count("unreadable, not validated: 'solid/solid_007.png': not an image") == 1

    def test_no_validation_tile(self, own_tiles, tmp_path):
        for path in read_tiles(own_tiles).select("val").paths:
            (own_tiles / path).write_text("no image")
        with pytest.raises(ValueError, match=r"none of the 12 validation tiles is readable \(first: glands/glands_006"):
            run_of(own_tiles, tmp_path / "run", epochs=1)


def test_weights_too_large_to_validate_are_a_divergence(tiles, tmp_path):
    """The last step's loss is finite; what it made of the weights shows in the validation alone."""
    settings = {"lr": 10, "warmup_epochs": 0, "clip_grad": None, "weight_decay": 0}
    with pytest.raises(ValueError, match=r"diverged at step 1: validation loss nan, .* no checkpoint yet.*lower --lr"):
        run_of(tiles, tmp_path / "run", batch_size=36, **settings)


class TestBadInput:
    def refused(self, data, tmp_path, message, **changes):
        with pytest.raises(ValueError, match=message):
            run_of(data, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()

    def test_labels_missing(self, tiles, tmp_path):
        self.refused(tiles / "solid", tmp_path, r"have no labels; put each in a folder of its class, or add a manifest")

    def test_one_class(self, own_tiles, tmp_path):
        write_manifest(own_tiles, keep=lambda path, group: "solid" in path.name)
        self.refused(own_tiles, tmp_path, "are all of one class, 'solid'")

    def test_a_class_without_training_tiles(self, own_tiles, tmp_path):
        write_manifest(own_tiles, keep=lambda path, group: "solid" not in path.name or group == 3)
        self.refused(own_tiles, tmp_path, r"no tile to train on is of class solid")

    def test_a_group_in_two_splits(self, own_tiles, tmp_path):
        text = (own_tiles / "manifest.csv").read_text()
        (own_tiles / "manifest.csv").write_text(text.replace("solid-3,val", "solid-2,val"))
        self.refused(own_tiles, tmp_path, "group 'solid-2' is in two splits")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"classes": ("solid", "bone")}, "class 'bone'; there is: glands, solid, stroma"),
            ({"split": "trian"}, "split 'trian'; there is: train, val"),
            ({"batch_size": 40}, "36 tiles are fewer than one batch of 40; use --batch-size 36"),
            ({"mixup": 0.2, "batch_size": 9}, "an odd number"),
            ({"model": "test_vit", "img_size": 64, "init": "pretrained", "device": "abacus"}, "device 'abacus'"),
            ({"model": "test_vit", "img_size": 65}, "test_vit cannot take images of 65 x 65 px"),
            ({"model": "ssmamba_tinny"}, "ssmamba_tiny"),
            (
                {"model": "ssmamba_base", "init": "pretrained"},
                r"no published weights; of this package, ssmamba_.* have",
            ),
            ({"auto_augment": "nonsense"}, "auto_augment is 'nonsense', expected a policy of timm"),
            ({"auto_augment": "rand-m9-q5"}, "auto_augment is 'rand-m9-q5'"),
        ],
    )
    def test_settings(self, tiles, tmp_path, changes, message):
        self.refused(tiles, tmp_path, message, **changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"init": ""}, r"init is '', expected"),
            (
                {"model": "local-dir:nowhere", "init": "pretrained"},
                r"^'nowhere' is no folder with a config.json; expected",
            ),
        ],
    )
    def test_weights_that_are_not_there(self, tiles, tmp_path, changes, message):
        with pytest.raises(OSError, match=message):
            run_of(tiles, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"balance": "magic"}, "balance is 'magic', expected one of none, loss, sampler"),
            ({"train_fraction": 0}, "train_fraction is 0"),
            ({"val_fraction": 1}, "val_fraction is 1"),
            ({"label_smoothing": 1}, "label_smoothing is 1"),
            ({"crop_scale": (0.5, 0.2)}, r"crop_scale is \[0.5, 0.2\]"),
            ({"layer_decay": 2}, "layer_decay is 2"),
        ],
    )
    def test_ranges(self, tiles, changes, message):
        with pytest.raises(ValueError, match=message):
            config_of(tiles, **changes)
