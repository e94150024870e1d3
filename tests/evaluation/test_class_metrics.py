"""Metrics equal scikit-learn's, for the test set and for each bootstrap draw."""

import numpy as np
import pytest

from ssmamba_models.evaluation.bootstrap import Resampling
from ssmamba_models.evaluation.class_metrics import (
    ClassCounts,
    class_table,
    confusion_matrix,
    estimate_metrics,
    one_vs_rest_auc,
)

metrics = pytest.importorskip("sklearn.metrics", reason="compared with scikit-learn")

CLASSES = ("a", "b", "c")


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    actual = rng.integers(0, 3, 90)
    scores = rng.random((90, 3)).round(1)  # rounding makes ties
    scores[np.arange(90), actual] += 0.2
    return actual, scores / scores.sum(axis=1, keepdims=True)


def by_sklearn(actual, scores):
    predicted = scores.argmax(axis=1)
    return {
        "macro_f1": metrics.f1_score(actual, predicted, average="macro"),
        "balanced_accuracy": metrics.balanced_accuracy_score(actual, predicted),
        "accuracy": metrics.accuracy_score(actual, predicted),
        "auc": metrics.roc_auc_score(actual, scores, multi_class="ovr", average="macro"),
    }


def test_every_metric_and_every_draw(case):
    actual, scores = case
    groups = [f"g{label}{place % 7}" for place, label in enumerate(actual)]
    resampling = Resampling(groups, actual, draws=5)
    found = estimate_metrics(actual, scores[None], resampling)
    for name, value in by_sklearn(actual, scores).items():
        assert found[name].value == pytest.approx(value, abs=1e-6), name
    for draw, weights in enumerate(resampling.weights):
        rows = np.repeat(np.arange(90), weights.astype(int)[resampling.group_of])
        for name, value in by_sklearn(actual[rows], scores[rows]).items():
            assert found[name].draws[draw] == pytest.approx(value, abs=1e-6), name


def test_the_figure_is_the_mean_over_seeds(case):
    actual, scores = case
    perfect = np.eye(3)[actual]
    resampling = Resampling([str(place) for place in range(90)], actual, seeds=2, draws=10)
    found = estimate_metrics(actual, np.stack([scores, perfect]), resampling)["accuracy"]
    assert found.seeds == pytest.approx((by_sklearn(actual, scores)["accuracy"], 1.0))
    assert found.value == pytest.approx(np.mean(found.seeds))


def test_auc_without_one_side_is_unknown():
    auc = one_vs_rest_auc(np.array([0, 0, 1]), np.eye(2)[[0, 0, 1]], np.array([[1.0, 1, 1], [1, 1, 0]]))
    assert auc[0].tolist() == [1, 1]
    assert np.isnan(auc[1]).all()


def test_a_class_without_tiles_does_not_count_even_if_it_is_predicted():
    actual, predicted = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 2, 1, 0])
    hits, seen, there = np.array([2, 1, 0]), np.array([3, 1, 1]), np.array([3, 2, 0])
    found = ClassCounts(hits, seen, there).scores()
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(actual, predicted, labels=[0, 1], average="macro"))
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_the_table_of_classes_and_the_confusion_matrix(case):
    actual, scores = case
    predicted = scores.argmax(axis=1)
    precision, recall, f1, tiles = metrics.precision_recall_fscore_support(actual, predicted)
    for place, row in enumerate(class_table(actual, scores[None], CLASSES, np.arange(90) // 2)):
        assert (row["class"], row["tiles"]) == (CLASSES[place], tiles[place])
        found = row["precision"], row["recall"], row["f1"]
        assert found == pytest.approx((precision[place], recall[place], f1[place]))
        assert row["auc"] == pytest.approx(metrics.roc_auc_score(actual == place, scores[:, place]))
        assert row["groups"] == len(set(np.flatnonzero(actual == place) // 2))
    assert np.array_equal(confusion_matrix(actual, scores), metrics.confusion_matrix(actual, predicted))


def test_a_group_drawn_twice_is_not_compared_with_its_copy():
    """Each group tells its two sides apart, groups do not agree on the scale: the draws' mean stays at the value."""
    dice = np.random.default_rng(0)
    group_of = np.repeat(np.arange(5), 4)
    actual = np.tile([0, 0, 1, 1], 5)
    score = dice.normal(size=5)[group_of] * 5 + actual
    scores = np.stack([-score, score], axis=1)
    drawn = dice.multinomial(5, np.full(5, 0.2), size=4000)[:, group_of]
    plain = one_vs_rest_auc(actual, scores, np.ones((1, 20)), group_of)[0, 1]
    areas = one_vs_rest_auc(actual, scores, drawn, group_of)[:, 1]
    copied = one_vs_rest_auc(actual, scores, drawn)[:, 1]
    assert np.nanmean(areas) == pytest.approx(plain, abs=0.02)
    assert np.nanmean(copied) > plain + 0.03
    once = one_vs_rest_auc(actual, scores, np.ones((1, 20)))[0, 1]
    assert once == plain


def test_groups_drawn_twice_weigh_their_pairs():
    """By hand: groups {+3, -1} and {+2, -4}, the first drawn twice."""
    actual, group_of = np.array([1, 0, 1, 0]), np.array([0, 0, 1, 1])
    score = np.array([3.0, 1.0, 2.0, 4.0])
    scores = np.stack([-score, score], axis=1)
    # Inside: 2 x (3 > 1) and 1 x (2 < 4); across: 2 x (3 < 4) and 2 x (2 > 1).
    area = one_vs_rest_auc(actual, scores, np.array([[2, 2, 1, 1]]), group_of)[0, 1]
    assert area == pytest.approx((2 + 2) / (2 + 1 + 2 + 2))
