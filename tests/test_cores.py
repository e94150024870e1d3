"""Cores, hyper-threads apart and together."""

import os

import pytest

from ssmamba_models import cores


@pytest.fixture
def topology(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4, 5}, raising=False)
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path)
    for core in range(8):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    return tmp_path


def test_hyper_threads_of_a_core_are_one_core(topology):
    assert (cores.count_cores(), cores.count_physical_cores()) == (4, 2)


def test_where_the_system_does_not_tell_them_apart_they_count(topology):
    (topology / "cpu5" / "topology" / "thread_siblings_list").unlink()
    assert cores.count_physical_cores() == 4
