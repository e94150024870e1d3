"""Folds: groups are never divided, every class is on both sides, and every tile is scored once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_cases import grouped_tiles, named_tiles

from ssmamba_models.evaluation.folds import make_protocol
from ssmamba_models.evaluation.tasks import Task

pytest.importorskip("sklearn", reason="folds need the [eval] extra")

TASK = Task("task", ("a", "b"))


def is_sound(tiles, protocol):
    units, labels = np.asarray(tiles.units), np.asarray(tiles.labels)
    for folds in protocol.seeds:
        for fold in folds:
            assert not set(units[fold.train]) & set(units[fold.test])
            assert set(labels[fold.train]) == set(TASK.classes)
            assert set(labels[fold.test]) <= set(TASK.classes)
        scored = np.concatenate([fold.test for fold in folds])
        assert np.array_equal(np.sort(scored), protocol.test)
    return True


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc")), max_size=60), st.integers(2, 4))
def test_groups_never_cross_folds(drawn, folds):
    base = [(f"{name}{group}", name) for name in "ab" for group in range(4)]
    rows = base + [(f"{'' if group > 7 else label}{group}", label) for group, label in drawn]
    tiles = named_tiles([label for _, label in rows], [group for group, _ in rows])
    try:
        protocol = make_protocol(tiles, TASK, folds, seeds=2)
    except ValueError as error:
        if "groups hold several classes" in str(error):  # groups 8 and 9 may
            return
        raise
    assert is_sound(tiles, protocol)
    assert set(protocol.test) == {place for place, name in enumerate(tiles.labels) if name in TASK.classes}


def test_splits_of_the_tiles_are_used_and_seeds_leave_out_training_groups():
    tiles = grouped_tiles(groups_per_class=20, val_share=0.25)
    protocol = make_protocol(tiles, TASK, seeds=3)
    assert (protocol.kind, protocol.test_split) == ("split", "val")
    assert is_sound(tiles, protocol)
    assert {tiles.splits[place] for place in protocol.test} == {"val"}
    assert len(protocol.test) == 2 * 5 * 4
    parts = [tuple(fold.train) for (fold,) in protocol.seeds]
    assert len(set(parts)) == 3
    assert {len(part) for part in parts} == {2 * round(0.9 * 15) * 4}


def test_one_seed_learns_from_all_training_tiles():
    ((fold,),) = make_protocol(grouped_tiles(groups_per_class=20, val_share=0.25), TASK, seeds=1).seeds
    assert len(fold.train) == 2 * 15 * 4


def test_the_split_test_is_scored_where_there_is_one():
    tiles = named_tiles("ab" * 4, splits=["train"] * 4 + ["val"] * 2 + ["test"] * 2)
    protocol = make_protocol(tiles, TASK, seeds=1)
    assert protocol.test_split == "test"
    assert protocol.test.tolist() == [6, 7]
    assert protocol.seeds[0][0].train.tolist() == [0, 1, 2, 3]


def test_without_groups_each_tile_is_one():
    tiles = named_tiles("ab" * 6)
    protocol = make_protocol(tiles, TASK, folds=3, seeds=2)
    assert is_sound(tiles, protocol)
    assert [len(fold.test) for fold in protocol.seeds[0]] == [4, 4, 4]


@pytest.mark.parametrize(
    ("tiles", "said"),
    [
        (named_tiles("aabb", "1122"), "class 'a' has 1 groups, too few for 5 folds; add tiles"),
        (named_tiles("aabbb", "12345"), "class 'a' has 2 groups.*use --folds 2"),
        (named_tiles("abab", splits=["train", "train", "dev", "dev"]), "are dev, train; expected train, and val"),
        (named_tiles("aba", splits=["train", "train", "val"]), "no tile of class 'b' is in the split 'val'"),
        (named_tiles("aab", splits=["train", "val", "val"]), "no tile of class 'b' is in the split 'train'"),
    ],
)
def test_what_cannot_be_divided(tiles, said):
    with pytest.raises(ValueError, match=said):
        make_protocol(tiles, TASK)


@pytest.mark.parametrize(
    ("noun", "place"), [("tile", "the manifest's column 'split'"), ("slide", "the labels' column 'split'")]
)
def test_groups_of_several_classes_name_a_cure_that_there_is(noun, place):
    """Both groups of class b in one fold: two folds are the fewest, and a table of slides is no manifest."""
    with pytest.raises(ValueError, match=rf"no training {noun} of class 'b'.*; add {noun}s of other.* in {place}$"):
        make_protocol(named_tiles("bbaa", "2312"), TASK, folds=2, seeds=1, noun=noun)


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match="folds is 1 and seeds 3"):
        make_protocol(named_tiles("abab"), TASK, folds=1)
