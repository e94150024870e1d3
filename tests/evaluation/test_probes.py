"""Linear probe, kNN and prototypes equal direct computations, and find what is there and nothing else."""

import numpy as np
import pytest
from labelled_cases import features_of, grouped_tiles

from ssmamba_models.evaluation.bootstrap import Resampling, compare
from ssmamba_models.evaluation.few_shot import draw_episodes, few_shot, prototypes, shot_counts
from ssmamba_models.evaluation.folds import Fold, Protocol
from ssmamba_models.evaluation.knn import knn
from ssmamba_models.evaluation.linear_probe import linear_probe
from ssmamba_models.evaluation.scoring import METHODS, TaskData, compare_encoders, score_encoder
from ssmamba_models.evaluation.settings import Settings
from ssmamba_models.evaluation.tasks import Task

pytest.importorskip("sklearn", reason="probes need the [eval] extra")

TASK = Task("task", ("a", "b", "c"))
QUICK = Settings(folds=3, seeds=2, episodes=20, draws=200)


@pytest.fixture
def blobs():
    labels = np.repeat([0, 1, 2], 40)
    features = features_of(labels, distance=2.0)
    order = np.random.default_rng(0).permutation(120)
    train, test = order[:80], order[80:]
    return features[train], labels[train], features[test], labels[test]


def test_linear_probe_is_scikit_learns_logistic_regression(blobs):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, labels, test, _ = blobs
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=16 * 3 / 100, max_iter=1000))
    probe.fit(train.astype(np.float64), labels)
    scores, converged = linear_probe(train, labels, test)
    assert converged
    assert np.allclose(scores, probe.predict_proba(test.astype(np.float64)))


def test_linear_probe_does_not_depend_on_a_features_scale(blobs):
    train, labels, test, _ = blobs
    scale = np.logspace(-3, 3, 16).astype(np.float32)
    first, second = linear_probe(train, labels, test)[0], linear_probe(train * scale, labels, test * scale)[0]
    assert np.allclose(first, second, atol=1e-3)


def test_a_probe_that_does_not_converge_says_so(blobs, monkeypatch):
    train, labels, test, _ = blobs
    monkeypatch.setattr("ssmamba_models.evaluation.linear_probe.MAX_ITERATIONS", 2)
    assert not linear_probe(train, labels, test)[1]


def test_knn_is_a_vote_of_the_most_similar(blobs):
    train, labels, test, _ = blobs
    centre = train.mean(axis=0)

    def unit(features):
        return (features - centre) / np.linalg.norm(features - centre, axis=1, keepdims=True)

    nearest = np.argsort(-(unit(test) @ unit(train).T), axis=1)[:, :20]
    votes = np.stack([(labels[nearest] == label).mean(axis=1) for label in range(3)], axis=1)
    assert np.allclose(knn(train, labels, test, neighbours=20), votes)


def test_knn_with_fewer_tiles_than_neighbours_takes_all(blobs):
    train, labels, test, _ = blobs
    assert np.allclose(knn(train[:10], labels[:10], test)[0], np.bincount(labels[:10], minlength=3) / 10)


def test_prototypes_are_class_means(blobs):
    train, labels, test, _ = blobs
    centre = train.mean(axis=0)
    unit = (train - centre) / np.linalg.norm(train - centre, axis=1, keepdims=True)
    query = (test - centre) / np.linalg.norm(test - centre, axis=1, keepdims=True)
    means = np.stack([unit[labels == label].mean(axis=0) for label in range(3)])
    distances = ((query[:, None] - means) ** 2).sum(axis=-1)
    assert np.allclose(prototypes(train, labels, test), -distances, atol=1e-5)


def test_episodes_take_their_tiles_from_different_groups():
    labels = np.repeat([0, 1], 30)
    units = np.array([f"{label}{place % 8}" for place, label in enumerate(labels)])
    assert shot_counts(labels, units) == [1, 2, 4, 8]
    chosen = draw_episodes(labels, units, 8, 50, np.random.default_rng(0))
    assert chosen.shape == (50, 2, 8)
    for label in (0, 1):
        assert (labels[chosen[:, label]] == label).all()
        assert all(len(set(row)) == 8 for row in units[chosen[:, label]])
    assert len(set(chosen[:, 0, 0])) > 10


def test_few_shots_equal_the_definition_episode_by_episode():
    tiles = grouped_tiles(groups_per_class=6, tiles_per_group=3)
    labels, units = np.array(["abc".index(name) for name in tiles.labels]), np.asarray(tiles.groups)
    features = features_of(labels, distance=2.0) + 5
    places = np.arange(len(labels))
    held_out = np.array([unit.endswith(("0", "1")) for unit in units])
    protocol = Protocol("split", ((Fold(places[~held_out], places[held_out]),),))
    data = TaskData(tiles, TASK, Settings(folds=2, seeds=1, draws=10))
    resampling = Resampling(units[held_out], labels[held_out], draws=10)
    found = few_shot([features], data.labels, data.units, protocol, resampling, episodes=40)
    assert [entry.shots for entry in found] == [1, 2, 4]
    for entry in found:
        rng = np.random.default_rng([0, entry.shots])
        train, test = features[~held_out], features[held_out]
        chosen = draw_episodes(labels[~held_out], units[~held_out], entry.shots, 40, rng)
        answers = [
            prototypes(train[episode.ravel()], np.repeat([0, 1, 2], entry.shots), test).argmax(axis=1)
            for episode in chosen
        ]
        accuracies = [(answer == labels[held_out]).mean() for answer in answers]
        assert entry.estimates["accuracy"].value == pytest.approx(np.mean(accuracies), abs=1e-6)
        assert entry.spread["accuracy"] == pytest.approx(tuple(np.percentile(accuracies, (2.5, 97.5))), abs=1e-6)


def test_few_shots_are_scored_over_all_folds_together():
    """Folds with one group of each class, which many a draw leaves out."""
    from sklearn.metrics import f1_score

    tiles = grouped_tiles(groups_per_class=4, tiles_per_group=5)
    labels, units = np.array(["abc".index(name) for name in tiles.labels]), np.asarray(tiles.groups)
    features, places = features_of(labels, distance=3.0), np.arange(len(labels))
    parts = [np.array([unit.endswith(str(part)) for unit in units]) for part in range(4)]
    folds = tuple(Fold(places[~part], places[part]) for part in parts)
    resampling = Resampling(units, labels, draws=60)
    entry = few_shot([features], labels, units, Protocol("folds", (folds,)), resampling, episodes=160)[0]
    rng = np.random.default_rng([0, 1])
    answers, alone = np.zeros((40, len(labels)), int), []
    for fold in folds:
        chosen = draw_episodes(labels[fold.train], units[fold.train], 1, 40, rng)
        for row, episode in zip(answers, chosen):
            support = features[fold.train][episode.ravel()]
            row[fold.test] = prototypes(support, np.arange(3), features[fold.test]).argmax(axis=1)
            alone.append((row[fold.test] == labels[fold.test]).mean())

    def macro_f1(rows):
        return np.mean([f1_score(labels[rows], answer[rows], average="macro") for answer in answers])

    found = entry.estimates["macro_f1"]
    assert found.value == pytest.approx(macro_f1(places), abs=1e-6)
    for weights, drawn in zip(resampling.weights[:5], found.draws):
        assert drawn == pytest.approx(macro_f1(np.repeat(places, weights.astype(int)[resampling.group_of])), abs=1e-6)
    assert found.draws.mean() == pytest.approx(found.value, abs=0.02)
    assert entry.spread["accuracy"] == pytest.approx(tuple(np.percentile(alone, (2.5, 97.5))), abs=1e-6)


@pytest.mark.parametrize("val_share", [None, 0.25])
def test_separable_features_are_separated_by_every_method(val_share):
    tiles = grouped_tiles(val_share=val_share)
    scores = score_encoder(TaskData(tiles, TASK, QUICK), [features_of(tiles.labels, 30.0)] * 2, QUICK)
    for method in METHODS:
        estimate = scores.methods[method].estimates["macro_f1"]
        assert (estimate.value, estimate.interval()) == (1.0, (1.0, 1.0)), method
        assert scores.methods[method].estimates["auc"].value == 1.0
    assert scores.shots[-1].estimates["macro_f1"].value == pytest.approx(1.0)


def test_noise_scores_chance_within_the_interval():
    tiles = grouped_tiles(groups_per_class=40, tiles_per_group=2)
    scores = score_encoder(TaskData(tiles, TASK, QUICK), [features_of(tiles.labels, 0.0)] * 2, QUICK)
    for method in METHODS:
        low, high = scores.methods[method].estimates["balanced_accuracy"].interval()
        assert low < 1 / 3 < high, method
        low, high = scores.methods[method].estimates["auc"].interval()
        assert low < 0.5 < high, method


def test_scores_are_of_the_tiles_in_their_order():
    # One class is found by the first feature alone: each tile's score must be its own.
    tiles = grouped_tiles(groups_per_class=6)
    features = features_of(tiles.labels, 30.0)
    data = TaskData(tiles, TASK, QUICK)
    answers = score_encoder(data, [features] * 2, QUICK).methods["knn"].scores.argmax(axis=2)
    assert (answers == data.test_labels).all()


def test_comparisons_tell_better_from_worse_and_a_model_from_itself_not():
    tiles = grouped_tiles(groups_per_class=20)
    data = TaskData(tiles, TASK, QUICK)
    good, bad = ([features_of(tiles.labels, distance)] * 2 for distance in (4.0, 0.0))
    scores = {"good": score_encoder(data, good, QUICK), "bad": score_encoder(data, bad, QUICK)}
    scores["again"] = score_encoder(data, good, QUICK)
    rows = {(row["first"], row["second"], row["method"], row["metric"]): row for row in compare_encoders(scores)}
    ahead = rows["good", "bad", "linear_probe", "macro_f1"]
    assert ahead["low"] > 0.3
    assert ahead["p"] == pytest.approx(2 / 201)
    for (first, second, _, _), row in rows.items():
        if (first, second) == ("good", "again"):
            assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)
    assert ("good", "bad", "1-shot", "accuracy") in rows
    estimates = [scores[name].methods["knn"].estimates["auc"] for name in ("good", "bad")]
    assert rows["good", "bad", "knn", "auc"] == rows["good", "bad", "knn", "auc"] | compare(*estimates)
