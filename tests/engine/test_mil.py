"""Training aggregators: folds by patient, the planted signal found, seeds, resuming, what is refused, prediction."""

from __future__ import annotations

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("h5py", reason="multiple-instance learning needs the [mil] extra")
pytest.importorskip("sklearn", reason="multiple-instance learning needs the [mil] extra")
pytest.importorskip("torchmil", reason="multiple-instance learning needs the [mil] extra")

from mil_cases import QUICK, quick_config
from sklearn.metrics import roc_auc_score

from ssmamba_models.data.bags import read_bags
from ssmamba_models.data.features import open_slide_features, write_slide_features
from ssmamba_models.data.synthetic_slides import write_synthetic_slides
from ssmamba_models.engine import mil
from ssmamba_models.engine.config import load_config
from ssmamba_models.engine.mil import train_mil
from ssmamba_models.engine.mil_config import MilConfig
from ssmamba_models.engine.mil_data import BagReader
from ssmamba_models.engine.mil_folds import make_folds
from ssmamba_models.engine.mil_model import load_mil_model
from ssmamba_models.engine.mil_predict import predict_mil, score_tiles
from ssmamba_models.slide import create_slide_encoder
from ssmamba_models.slide.aggregators import list_aggregators
from ssmamba_models.slide.slide_weights import save_slide_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """44 slides of 30 patients; not to be written in."""
    folder = tmp_path_factory.mktemp("mil") / "features"
    write_synthetic_slides(folder, patients=30, tiles=60, feature_dim=16, shift=3.0)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Twelve slides of eight patients; not to be written in."""
    folder = tmp_path_factory.mktemp("small") / "features"
    write_synthetic_slides(folder, patients=8, tiles=20, feature_dim=6, shift=3.0)
    return folder


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory):
    """A finished training of abmil, and its result."""
    out = tmp_path_factory.mktemp("run") / "run"
    return out, train_mil(quick_config(slides), out, progress=False)


def write_slide(path, name, features, **attributes) -> None:
    """One slide with these features, of tiles in a row."""
    geometry = {
        "patch_size": 224, "patch_size_level0": 448, "overlap": 0, "level0_mpp": 0.25, "target_mpp": 0.5,
        "level0_width": 9000, "level0_height": 9000, "name": name,
    }  # fmt: skip
    coords = np.arange(len(features))[:, None] * np.array([[448, 0]])
    with write_slide_features(
        path, features.shape[1], coords_attributes=geometry, attributes=attributes, overwrite=True
    ) as writer:
        writer.append(features, coords)


def auc(predictions) -> float:
    actual = [row.label == "positive" for row in predictions]
    return roc_auc_score(actual, [row.probabilities[1] for row in predictions])


def table(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def label(folder, rows, header=("slide", "label", "patient", "split")):
    path = folder / "own.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


# ---- what a training gives ----


def test_every_aggregator_is_tried():
    assert sorted(QUICK) == sorted(list_aggregators())


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """105 slides of 70 patients, with splits; not to be written in."""
    folder = tmp_path_factory.mktemp("divided")
    bags = read_bags(folder, write_synthetic_slides(folder, patients=70, tiles=30, feature_dim=8, shift=5.0))
    splits = ("train",) * 44 + ("val",) * 10 + ("test",) * 16
    split_of = dict(zip(sorted(set(bags.patients)), splits))
    return folder, label(folder, [(bag.slide, bag.label, bag.patient, split_of[bag.patient]) for bag in bags.bags])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "pama" else name for name in QUICK]
)
def test_the_planted_signal_is_found(name, divided, tmp_path):
    """AUC over slides of patients that the model never saw."""
    folder, labels = divided
    result = train_mil(quick_config(folder, name, labels=labels), tmp_path / "run", progress=False)
    assert len({row.patient for row in result.predictions}) == 16
    assert auc(result.predictions) > 0.9


def test_pama_is_fine_tuned_and_then_needs_its_first_weights_no_more(small, tmp_path):
    torch.manual_seed(0)
    encoder = create_slide_encoder("test_pama", 6, max_tiles=12)
    save_slide_encoder(encoder, tmp_path / "encoder")
    arguments = {"init": str(tmp_path / "encoder")}
    config = quick_config(small, "pama", aggregator_args=arguments, folds=2, epochs=1, lr=1e-9)
    train_mil(config, tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "encoder")
    loaded = load_mil_model(tmp_path / "run").model.encoder
    assert (loaded.name, loaded.max_tiles) == ("test_pama", 12)
    torch.testing.assert_close(loaded.state_dict(), encoder.state_dict(), rtol=0, atol=1e-5)
    predict_mil(tmp_path / "run", small, tmp_path / "p.csv", progress=False)


def test_the_planted_signal_is_found_in_every_fold(run):
    assert len(run[1].predictions) == 44
    assert auc(run[1].predictions) > 0.9


def test_what_a_run_leaves(run, slides):
    out, result = run
    assert sorted(os.listdir(out)) == [
        "config.yaml", "fold-0", "fold-1", "fold-2", "predictions.csv", "slides.json", "weights.safetensors",
    ]  # fmt: skip
    assert load_config(MilConfig, out / "config.yaml") == quick_config(slides)
    rows = table(out / "predictions.csv")
    assert sorted(row["slide"] for row in rows) == [bag.slide for bag in read_bags(slides, slides / "labels.csv").bags]
    best = min(range(3), key=lambda fold: result.folds[fold]["val_loss"])
    assert result.best_fold == best
    weights = [(out / f"fold-{fold}" / "weights.safetensors").read_bytes() for fold in range(3)]
    assert (out / "weights.safetensors").read_bytes() == weights[best]
    assert len(set(weights)) == 3
    for record in result.folds:
        losses = [epoch["val_loss"] for epoch in record["history"]]
        assert record["val_loss"] == min(losses) == losses[record["best_epoch"] - 1]
    facts = json.loads((out / "slides.json").read_text())
    assert (facts["slides"], facts["patients"]) == (44, 30)


def test_the_kept_weights_are_those_of_the_best_epoch(run, slides):
    """Their validation loss, computed again, is the one that the fold reports."""
    out, result = run
    bags = read_bags(slides, slides / "labels.csv")
    for record in result.folds:
        model = load_mil_model(out / f"fold-{record['fold']}" / "weights.safetensors").model
        places = [place for place, bag in enumerate(bags.bags) if bag.slide in record["slides"]["val"]]
        fold = make_folds(bags, quick_config(slides))[record["fold"]]
        assert places == fold.val.tolist()
        weights = len(fold.train) / (2 * np.bincount(bags.targets[fold.train]))
        losses = []
        for place in places:
            features, coords = BagReader(bags, 0).read(place)
            output = model(features[None], coords[None])
            target = torch.tensor([bags.targets[place]])
            losses.append(model.loss(output, target, torch.tensor(weights, dtype=torch.float32)).item())
        assert np.mean(losses) == pytest.approx(record["val_loss"], rel=1e-4)


def test_the_same_seed_gives_the_same_bytes(small, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_mil(quick_config(small, "abmil", epochs=2, folds=2, seed=seed), tmp_path / name, progress=False)
    read = {name: (tmp_path / name / "predictions.csv").read_bytes() for name in "abc"}
    assert read["a"] == read["b"] != read["c"]


def test_resuming_gives_what_an_unbroken_run_gives(small, tmp_path, monkeypatch):
    config = quick_config(small, "abmil", epochs=2)
    train_mil(config, tmp_path / "whole", progress=False)
    trained = []
    train_fold = mil._train_fold

    def stop_in_the_second(config, bags, fold, number, *rest):
        if number == 1 and not trained[1:]:
            trained.append(None)
            raise KeyboardInterrupt
        trained.append(number)
        train_fold(config, bags, fold, number, *rest)

    monkeypatch.setattr(mil, "_train_fold", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_mil(config, tmp_path / "broken", progress=False)
    assert not (tmp_path / "broken" / "weights.safetensors").exists()
    # What a fold that was stopped leaves is not a fold.
    (tmp_path / "broken" / "fold-1").mkdir()
    (tmp_path / "broken" / "fold-1" / "predictions.csv").write_text("half")
    with pytest.raises(FileExistsError, match="go on with it by --resume"):
        train_mil(config, tmp_path / "broken", progress=False)
    train_mil(config, tmp_path / "broken", resume=True, progress=False)
    assert trained == [0, None, 1, 2]
    for name in ("predictions.csv", "weights.safetensors", "fold-1/fold.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_goes_on_with_what_it_was_begun_with(small, tmp_path):
    config = quick_config(small, "mean", epochs=1)
    train_mil(config, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"begun with other settings \(lr: 0.005, now 0.1\)"):
        train_mil(quick_config(small, "mean", epochs=1, lr=0.1), tmp_path / "run", resume=True)
    shutil.copytree(small, tmp_path / "moved")
    moved = quick_config(tmp_path / "moved", "mean", epochs=1)
    train_mil(moved, tmp_path / "run", resume=True, progress=False)
    rows = (tmp_path / "moved" / "labels.csv").read_text().splitlines()
    (tmp_path / "moved" / "labels.csv").write_text("\n".join(rows[:-1]))
    with pytest.raises(ValueError, match="begun with other slides, labels, splits or features"):
        train_mil(moved, tmp_path / "run", resume=True, progress=False)


def test_early_stopping(small, tmp_path):
    config = quick_config(small, "mean", epochs=40, patience=2, lr=1.0, folds=2)
    result = train_mil(config, tmp_path / "run", progress=False)
    for record in result.folds:
        assert len(record["history"]) == record["best_epoch"] + 2 < 40


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"max_tiles": 7}, {"cache_gb": 0.0}, {"precision": "bf16"}])
def test_other_settings_train(settings, small, tmp_path):
    config = quick_config(small, "abmil", epochs=2, folds=2)
    plain = train_mil(config, tmp_path / "plain", progress=False)
    result = train_mil(quick_config(small, "abmil", epochs=2, folds=2, **settings), tmp_path / "run", progress=False)
    same = [row.probabilities for row in result.predictions] == [row.probabilities for row in plain.predictions]
    assert same == ("cache_gb" in settings)


@pytest.mark.parametrize("name", list_aggregators())
def test_every_aggregator_trains_in_bf16(name, small, tmp_path):
    config = quick_config(small, name, epochs=1, folds=2, precision="bf16")
    result = train_mil(config, tmp_path / "run", progress=False)
    assert len(result.predictions) == 12
    scores = score_tiles(tmp_path / "run", small / f"{result.predictions[0].slide}.h5", precision="bf16", device="cpu")
    assert scores.attention.sum() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(
    ("balance", "least", "most"), [("none", 0.12, 0.22), ("loss", 0.45, 0.55), ("sampler", 0.35, 0.65)]
)
def test_balance(balance, least, most, tmp_path):
    """Of slides that look all the same, a class of a sixth of them has that chance, or with balance that of a half."""
    rows, splits = [], ("train", "train", "val", "test")
    for number in range(24):
        name = f"s{number:02d}"
        write_slide(tmp_path / f"{name}.h5", name, np.ones((3, 4), np.float32))
        rows.append((name, "rare" if number % 6 == 0 else "often", name, splits[number // 6]))
    labels = label(tmp_path, rows)
    settings = {"epochs": 60, "patience": 60, "batch_size": 12, "lr": 0.05, "aggregator_args": {"dropout": 0.0}}
    config = quick_config(tmp_path, "mean", balance=balance, labels=labels, **settings)
    result = train_mil(config, tmp_path / "run", progress=False)
    assert [least <= row.probabilities[1] <= most for row in result.predictions] == [True] * 6


# ---- folds ----


def test_folds_keep_patients_whole_and_test_each_slide_once(slides):
    bags = read_bags(slides, slides / "labels.csv")
    folds = make_folds(bags, quick_config(slides, folds=5))
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(44))
    for fold in folds:
        sides = [{bags.patients[place] for place in part} for part in (fold.train, fold.val, fold.test)]
        assert sum(map(len, sides)) == len(set.union(*sides))
        assert len(fold.train) + len(fold.val) + len(fold.test) == 44
        assert all(len(set(bags.targets[part])) == 2 for part in (fold.train, fold.val, fold.test))
        assert 0.1 < len(fold.val) / (len(fold.train) + len(fold.val)) < 0.35


def test_a_patient_of_two_classes_stays_whole(small, tmp_path):
    bags = read_bags(small, small / "labels.csv")
    rows = [(bag.slide, bag.label, "both" if bag.patient in ("patient_002", "patient_003") else bag.patient)
            for bag in bags.bags]  # fmt: skip
    mixed = read_bags(small, label(tmp_path, rows, ("slide", "label", "patient")))
    folds = make_folds(mixed, quick_config(small, folds=3))
    tested = [[place for place in fold.test if mixed.patients[place] == "both"] for fold in folds]
    assert sorted(map(len, tested)) == [0, 0, 4]
    assert all(set(mixed.targets[fold.train]) == {0, 1} for fold in folds)


def test_splits_of_the_labels(small, tmp_path):
    bags = read_bags(small, small / "labels.csv")
    split_of = dict(zip(sorted(set(bags.patients)), ("train", "train", "train", "train", "test", "test", "val", "val")))
    rows = [(bag.slide, bag.label, bag.patient, split_of[bag.patient]) for bag in bags.bags]
    with_val = read_bags(small, label(tmp_path, rows))
    (fold,) = make_folds(with_val, quick_config(small))
    for name in ("train", "val", "test"):
        assert [with_val.bags[place].split for place in getattr(fold, name)] == [name] * len(getattr(fold, name))
    without = read_bags(small, label(tmp_path, [(*row[:3], row[3].replace("val", "train")) for row in rows]))
    (fold,) = make_folds(without, quick_config(small))
    assert {without.bags[place].split for place in fold.val} == {"train"}
    assert len(fold.test) == sum(row[3] == "test" for row in rows)
    lacking = read_bags(small, label(tmp_path, [(*row[:3], row[3].replace("test", "train")) for row in rows]))
    with pytest.raises(ValueError, match="the split 'test' of the labels has no slide of class 'negative'"):
        make_folds(lacking, quick_config(small))


def test_too_few_patients(small):
    bags = read_bags(small, small / "labels.csv")
    with pytest.raises(ValueError, match="class 'negative' has slides of 4 patients to divide, too few for 5 folds"):
        make_folds(bags, quick_config(small, folds=5))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"aggregator": "abmill"}, "unknown aggregator 'abmill'; did you mean abmil"),
        ({"aggregator_args": {"hiden_dim": 3}}, "has no argument 'hiden_dim'"),
        ({"folds": 1}, "folds is 1, expected 2 or more"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": "fast"}, "lr is 'fast', expected a number"),
        ({"min_lr": 1.0}, "min_lr is 1.0, expected at most lr"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"balance": "all"}, "balance is 'all', expected one of none, loss, sampler"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used"),
    ],
)
def test_settings_that_cannot_be(settings, words, small, tmp_path):
    arguments = {"features": str(small), "labels": str(small / "labels.csv"), "aggregator": "abmil", "folds": 2}
    with pytest.raises(ValueError, match=words):
        train_mil(MilConfig(**{**arguments, **settings}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_features_that_are_not_numbers(small, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(small, folder)
    name = "slide_001_0"
    features = np.ones((9, 6), np.float32)
    features[3, 2] = np.nan
    write_slide(folder / f"{name}.h5", name, features, model="synthetic", weights_sha256="none")
    with pytest.raises(ValueError, match=f"slide '{name}' is (nan|not finite).*ssmamba check"):
        train_mil(quick_config(folder, "mean", epochs=1), tmp_path / "run", progress=False)


def test_tested_slides_that_are_not_numbers(small, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(small, folder)
    lines = table(small / "labels.csv")
    tested = sorted({line["patient"] for line in lines})[-4:]
    rows = [(line["slide"], line["label"], line["patient"], line["patient"] in tested) for line in lines]
    rows = [(*row, "test" if test else "train") for *row, test in rows]
    name = rows[-1][0]
    write_slide(folder / f"{name}.h5", name, np.full((9, 6), np.nan, "f4"), model="synthetic", weights_sha256="none")
    config = quick_config(folder, "mean", epochs=1, labels=label(folder, rows))
    with pytest.raises(ValueError, match=f"says of slide '{name}' is not finite.*ssmamba check"):
        train_mil(config, tmp_path / "run", progress=False)


# ---- prediction ----


def test_prediction_is_that_of_the_fold(run, slides, tmp_path):
    out, result = run
    summary = predict_mil(out / "fold-1", slides, tmp_path / "p.csv", progress=False)
    found = {row.slide: row.probabilities for row in summary.predictions}
    assert len(found) == 44
    for row in result.predictions:
        if row.fold == 1:
            assert found[row.slide] == pytest.approx(row.probabilities, rel=1e-4)
    rows = table(tmp_path / "p.csv")
    assert list(rows[0]) == ["slide", "tiles", "prediction", "probability_negative", "probability_positive"]
    assert float(rows[0]["probability_positive"]) == pytest.approx(found[rows[0]["slide"]][1])


def test_the_ensemble_is_the_mean_of_the_folds(run, slides, tmp_path):
    out, _ = run
    file = slides / "slide_001_0.h5"
    each = [
        predict_mil(out / f"fold-{fold}", file, tmp_path / f"{fold}.csv", progress=False).predictions[0].probabilities
        for fold in range(3)
    ]
    summary = predict_mil(out, file, tmp_path / "all.csv", ensemble=True, progress=False)
    assert summary.models == 3
    assert summary.predictions[0].probabilities == pytest.approx(tuple(np.mean(each, axis=0)), rel=1e-5)


def test_attention_lies_on_the_spot(run, slides):
    scores = score_tiles(run[0], slides / "slide_001_0.h5")
    with open_slide_features(slides / "slide_001_0.h5") as file:
        features = file.features[:]
    # Shifted channels are those in which the mean of this slide's highest tiles stands out.
    channels = np.argsort(features.mean(axis=0))[-4:]
    spot = features[:, channels].mean(axis=1) > 1.5
    assert 0.03 < spot.mean() < 0.15
    assert scores.attention.shape == (len(features),)
    assert scores.attention.sum() == pytest.approx(1, rel=1e-4)
    assert scores.attention[spot].mean() > 2 * scores.attention[~spot].mean()


def test_bad_files_do_not_stop_the_others(run, slides, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("slide_000_0", "slide_001_0"):
        shutil.copy(slides / f"{name}.h5", folder)
    (folder / "zero.h5").write_bytes(b"")
    (folder / "cut.h5").write_bytes((slides / "slide_002_0.h5").read_bytes()[:2000])
    write_slide(folder / "nan.h5", "nan", np.full((3, 16), np.nan, "f4"), model="synthetic", weights_sha256="none")
    summary = predict_mil(run[0], folder, tmp_path / "p.csv", progress=False)
    assert [row.slide for row in summary.predictions] == ["slide_000_0", "slide_001_0"]
    reasons = {os.path.basename(path): reason for path, reason in summary.unreadable}
    assert set(reasons) == {"cut.h5", "nan.h5", "zero.h5"}
    assert "not finite; look for NaN" in reasons["nan.h5"]
    with pytest.raises(ValueError, match="slide 'nan' is not finite"):
        score_tiles(run[0], folder / "nan.h5")


def test_features_of_another_kind_are_refused(run, slides, small, tmp_path):
    with pytest.raises(ValueError, match=r"what the model was trained on.*feature_dim is 16 and 6"):
        predict_mil(run[0], small, tmp_path / "p.csv", progress=False)
    path = tmp_path / "other.h5"
    write_slide(path, "other", np.ones((3, 16), np.float32), model="another", weights_sha256="none")
    with pytest.raises(ValueError, match="model is 'synthetic' and 'another'"):
        score_tiles(run[0], path)
    assert not (tmp_path / "p.csv").exists()


def test_models_that_are_not(run, small, tmp_path):
    with pytest.raises(FileNotFoundError, match="`ssmamba mil train` writes it"):
        load_mil_model(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        load_mil_model(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="has no folds"):
        predict_mil(tmp_path, small, tmp_path / "p.csv", ensemble=True)
    with pytest.raises(FileExistsError, match="--overwrite"):
        predict_mil(run[0], small, run[0] / "predictions.csv")
