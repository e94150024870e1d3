"""Magnification: pairs are found where features agree, and tiles of the same group are no candidates."""

import numpy as np
import pytest

from ssmamba_models.evaluation.bootstrap import Resampling
from ssmamba_models.evaluation.magnification import match_halves, score_magnification, spread_places

UNITS = np.array([f"g{place // 2}" for place in range(40)])


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)


def test_equal_features_are_found_at_once(features):
    found = match_halves(features, features * 3, UNITS, centred=False)
    assert np.allclose(found["pair_cosine"], 1, atol=1e-6)
    assert (found["rank"] == 1).all()
    assert (found["recall_at_1"] == 1).all()


def test_cosines_and_ranks_equal_the_definition(features):
    half = features + np.random.default_rng(1).normal(size=features.shape).astype(np.float32)
    for centred in (False, True):
        found = match_halves(features, half, UNITS, centred)
        first, second = ((table - table.mean(axis=0) if centred else table) for table in (features, half))
        for place in (0, 7, 39):
            cosines = second @ first[place] / np.linalg.norm(second, axis=1) / np.linalg.norm(first[place])
            others = cosines[UNITS[place] != UNITS]
            assert found["pair_cosine"][place] == pytest.approx(cosines[place], abs=1e-5)
            assert found["other_cosine"][place] == pytest.approx(others.mean(), abs=1e-5)
            assert found["rank"][place] == 1 + (others > cosines[place]).sum()
            assert found["recall_at_10"][place] == (found["rank"][place] <= 10)


def test_a_shift_of_one_resolution_is_taken_out_by_centring(features):
    shifted = features + 20 * np.eye(8, dtype=np.float32)[0]
    plain, centred = (match_halves(features, shifted, UNITS, flag) for flag in (False, True))
    assert plain["recall_at_1"].mean() < 0.8
    assert np.allclose(centred["pair_cosine"], 1, atol=1e-4)


def test_constant_features_rank_in_the_middle():
    constant = np.ones((40, 8), np.float32)
    found = match_halves(constant, constant, UNITS, centred=True)
    assert (found["rank"] == 1 + 38 / 2).all()
    assert (found["recall_at_1"] == 0).all()


def test_scores_are_means_over_tiles_and_seeds(features):
    noise = np.random.default_rng(2).normal(size=features.shape).astype(np.float32)
    resampling = Resampling(UNITS, ["x"] * 40, seeds=2, draws=100)
    scores = score_magnification([features] * 2, [features, noise], UNITS, resampling)["plain"]
    ranks = [match_halves(features, half, UNITS, False)["rank"] for half in (features, noise)]
    assert scores["mean_rank"].value == pytest.approx(np.mean(ranks))
    assert scores["mean_rank"].seeds == pytest.approx([row.mean() for row in ranks])
    low, high = scores["mean_rank"].interval()
    assert low < scores["mean_rank"].value < high
    assert scores["median_rank"].seeds[0] == 1
    assert scores["recall_at_1"].seeds[0] == 1


def test_places_are_spread():
    assert spread_places(np.arange(5), 10).tolist() == [0, 1, 2, 3, 4]
    assert spread_places(np.arange(100), 4).tolist() == [0, 33, 66, 99]
