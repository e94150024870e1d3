"""Tasks: which classes are told apart, and what cannot be."""

import pytest
from labelled_cases import named_tiles

from ssmamba_models.data.labelled import LabelledTiles
from ssmamba_models.evaluation.tasks import Task, choose_tasks, parse_task

TILES = named_tiles(["lung_aca", "lung_n", "colon_n"])


def test_a_task_is_a_name_and_classes():
    assert parse_task("lung = lung_n, lung_aca") == Task("lung", ("lung_aca", "lung_n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lung", "not of the form"),
        ("=a,b", "not of the form"),
        ("lung=a,,b", "not of the form"),
        ("lung=a", "one class, 'a'"),
        ("lung=a,b,a", "a class twice"),
        ("../lung=a,b", "cannot be part of a file name"),
    ],
)
def test_a_task_that_cannot_be_read(text, said):
    with pytest.raises(ValueError, match=said):
        parse_task(text)


def test_by_default_there_is_one_task_of_all_classes():
    assert choose_tasks(TILES) == (Task("all", ("colon_n", "lung_aca", "lung_n")),)


def test_a_class_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"'lung_acc', which is not there; did you mean lung_aca\?.*colon_n, lung_aca"):
        choose_tasks(TILES, [Task("lung", ("lung_acc", "lung_n"))])


def test_two_tasks_of_one_name():
    with pytest.raises(ValueError, match="two tasks are called 'lung'"):
        choose_tasks(TILES, [Task("lung", ("lung_aca", "lung_n"))] * 2)


def test_no_labels():
    with pytest.raises(ValueError, match="no labels; put each class in a folder"):
        choose_tasks(LabelledTiles(TILES.root, TILES.paths, None))


def test_one_class():
    with pytest.raises(ValueError, match="of one class, 'a'"):
        choose_tasks(named_tiles(["a", "a"]))
