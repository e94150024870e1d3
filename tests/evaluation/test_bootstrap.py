"""Bootstrap intervals on cases that can be worked out, and comparisons of models."""

import numpy as np
import pytest

from ssmamba_models.evaluation.bootstrap import Estimate, Resampling, compare


def test_draws_keep_every_class_and_its_number_of_groups():
    groups = ["a1", "a1", "a2", "a3", "b1", "b2"]
    resampling = Resampling(groups, ["a"] * 4 + ["b"] * 2, draws=200)
    assert resampling.weights.shape == (200, 5)
    per_class = resampling.weights[:, :3].sum(axis=1), resampling.weights[:, 3:].sum(axis=1)
    assert (per_class[0] == 3).all()
    assert (per_class[1] == 2).all()


def test_a_class_that_is_everywhere_the_minority_is_in_every_draw():
    groups = [f"{group}" for group in range(6) for _ in range(3)]
    labels = ["a", "a", "a"] * 4 + ["a", "a", "b"] * 2
    resampling = Resampling(groups, labels, draws=300)
    assert (resampling.weights[:, :4].sum(axis=1) == 4).all()
    assert (resampling.weights[:, 4:].sum(axis=1) == 2).all()


def test_groups_of_one_class_are_drawn_class_by_class_in_the_order_of_their_names():
    resampling = Resampling(list("cabde"), ["y", "x", "x", "y", "x"], draws=20, seed=3)
    rng = np.random.default_rng(3)
    expected = np.empty((20, 5))
    expected[:, [0, 1, 4]] = rng.multinomial(3, [1 / 3] * 3, 20)
    expected[:, [2, 3]] = rng.multinomial(2, [1 / 2] * 2, 20)
    assert np.array_equal(resampling.weights, expected)


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(1)
    hits = rng.random(400) < 0.7
    resampling = Resampling([str(place) for place in range(400)], ["a"] * 400, draws=4000)
    estimate = resampling.mean(hits[None].astype(float))
    low, high = estimate.interval()
    error = 1.96 * hits.std() / np.sqrt(len(hits))
    assert estimate.value == hits.mean()
    assert (low, high) == pytest.approx((hits.mean() - error, hits.mean() + error), abs=0.006)


def test_tiles_that_repeat_their_group_say_no_more_than_one():
    values = np.random.default_rng(2).normal(size=50)
    alone = Resampling([f"{group:02}" for group in range(50)], ["a"] * 50).mean(values[None])
    groups = [f"{group:02}" for group in range(50) for _ in range(8)]
    repeated = Resampling(groups, ["a"] * 400).mean(np.repeat(values, 8)[None])
    assert repeated.interval() == pytest.approx(alone.interval(), abs=1e-6)


def test_seeds_that_differ_widen_the_interval():
    resampling = Resampling(list("abcd"), ["x"] * 4, seeds=2, draws=500)
    estimate = resampling.mean(np.array([[0.0] * 4, [1.0] * 4]))
    assert (estimate.value, estimate.seeds) == (0.5, (0.0, 1.0))
    assert estimate.interval() == (0.0, 1.0)
    assert set(np.round(estimate.draws, 6)) == {0.0, 0.5, 1.0}


def test_the_median_is_the_weighted_median():
    groups = list("aabbc")
    values = np.array([5.0, 1.0, 2.0, 8.0, 3.0])
    resampling = Resampling(groups, ["x"] * 5, draws=50)
    estimate = resampling.median(values[None])
    assert estimate.value == np.median(values)
    for weights, drawn in zip(resampling.weights, estimate.draws):
        spread = np.sort(np.repeat(values, weights.astype(int)[resampling.group_of]))
        assert drawn == spread[(len(spread) - 1) // 2]


def estimate_of(draws):
    return Estimate(float(np.mean(draws)), np.asarray(draws, float), (float(np.mean(draws)),))


def test_a_model_compared_with_itself():
    same = estimate_of(np.linspace(0, 1, 100))
    assert compare(same, same) == {"difference": 0, "low": 0, "high": 0, "p": 1.0}


def test_p_is_twice_the_share_of_draws_beyond_zero():
    worse = estimate_of(np.zeros(999))
    better = estimate_of(np.where(np.arange(999) < 24, -1.0, 1.0))
    assert compare(better, worse)["p"] == pytest.approx(2 * 25 / 1000)
    assert compare(worse, better)["p"] == compare(better, worse)["p"]
    assert compare(estimate_of(np.ones(999)), worse)["p"] == pytest.approx(2 / 1000)
