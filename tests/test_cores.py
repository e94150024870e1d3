"""Cores: affinity, hyper-threads apart and together, quotas of cgroups."""

import math
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


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A function: the process is in these cgroups (lines of /proc/self/cgroup), and these files are mounted."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path / "no topology")
    monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "mounted")

    def make(lines, files):
        (tmp_path / "membership").write_text("".join(f"{line}\n" for line in lines))
        for name, text in files.items():
            file = tmp_path / "mounted" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")

    return make


def v1(folder, quota, period=100_000):
    return {f"{folder}/cpu.cfs_quota_us": str(quota), f"{folder}/cpu.cfs_period_us": str(period)}


@pytest.mark.parametrize(
    ("lines", "files", "quota"),
    [
        ([], {}, math.inf),
        (["0::/"], {}, math.inf),
        (["0::/"], {"cpu.max": "max 100000"}, math.inf),
        (["0::/"], {"cpu.max": "250000 100000"}, 2.5),
        (["0::/"], {"cpu.max": "50000"}, 0.5),
        (["0::/a/b"], {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        (["0::/a/b"], {"a/b/cpu.max": "800000 100000", "a/cpu.max": "300000 100000", "cpu.max": "max 100000"}, 3),
        (["0::/a/b"], {"a/b/cpu.max": "100000 50000", "a/cpu.max": "300000 100000"}, 2),
        (["0::/a"], {"other/cpu.max": "100000 100000"}, math.inf),
        # No cgroup namespace: the host's path, of which the mount is the end.
        (["0::/docker/0123"], {"cpu.max": "400000 100000"}, 4),
        # The process is outside of its namespace.
        (["0::/../../x"], {"cpu.max": "400000 100000"}, 4),
        (["4:cpu,cpuacct:/job", "0::/"], v1("cpu,cpuacct/job", 150_000), 1.5),
        (["4:cpu,cpuacct:/job"], v1("cpu/job", 150_000, 50_000), 3),
        (["4:cpuacct,cpu:/docker/0123"], v1("cpu", 200_000), 2),
        (["4:cpu:/job/step"], {**v1("cpu/job/step", -1), **v1("cpu/job", 700_000)}, 7),
        (["4:cpu:/job"], v1("cpu/job", -1), math.inf),
        (["5:cpuset:/job", "6:memory:/job"], v1("cpuset/job", 100_000), math.inf),
        (["4:cpu:/job", "0::/job"], {**v1("cpu/job", 500_000), "unified/job/cpu.max": "300000 100000"}, 3),
        (["0::/a:b"], {"a:b/cpu.max": "200000 100000"}, 2),
        (["0::/", "nonsense"], {"cpu.max": "soon 100000"}, math.inf),
        (["0::/"], {"cpu.max": "100000 0"}, math.inf),
    ],
)
def test_the_smallest_quota_of_all_cgroups_counts(cgroups, lines, files, quota):
    cgroups(lines, files)
    assert cores.cpu_quota() == quota
    assert cores.count_cores() == cores.count_physical_cores() == max(1, min(16, math.floor(min(quota, 99))))


def test_where_there_are_no_cgroups_the_affinity_counts(cgroups):
    assert cores.cpu_quota() == math.inf
    assert cores.count_cores() == 16


def test_a_quota_is_no_more_cores_than_there_are(topology, cgroups, monkeypatch):
    cgroups(["0::/"], {"cpu.max": "300000 100000"})
    monkeypatch.setattr(cores, "_TOPOLOGY", topology)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4, 5})
    assert (cores.count_cores(), cores.count_physical_cores()) == (3, 2)


def test_a_share_bounds_the_cores_within_its_block(topology):
    with cores.limited_cores(1):
        assert (cores.count_cores(), cores.count_physical_cores()) == (1, 1)
        with cores.limited_cores(None):
            assert cores.count_cores() == 1
        with cores.limited_cores(3):
            assert (cores.count_cores(), cores.count_physical_cores()) == (3, 2)
        assert cores.count_cores() == 1
    assert cores.count_cores() == 4
