"""How many threads compute, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from ssmamba_models import cores, threads
from ssmamba_models.engine.finetune_config import FinetuneConfig
from ssmamba_models.engine.processes import default_workers
from ssmamba_models.notice import SSMambaWarning
from ssmamba_models.threads import spin_briefly, start_with_threads, threaded, use_threads
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.turns import default_readers, takes_all_cores

CPU = torch.device("cpu")


@pytest.fixture
def four_cores(monkeypatch, tmp_path):
    """Four cores, all of them torch's."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(cores, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield tmp_path
    torch.set_num_threads(before)


def set_quota(folder, cpus):
    (folder / "membership").write_text("0::/\n")
    (folder / "cpu.max").write_text(f"{cpus * 100_000:.0f} 100000\n")


class TestUseThreads:
    def test_torch_and_the_default_workers_stay_within_the_number(self, four_cores):
        assert default_workers(None, 1) == 4
        with use_threads(2) as number:
            assert number == torch.get_num_threads() == 2
            assert default_workers(None, 1) == default_readers(CPU) == 2
            assert takes_all_cores(CPU)  # of its share: nobody reads beside it
        assert torch.get_num_threads() == default_workers(None, 1) == 4

    def test_it_is_put_back_after_an_error(self, four_cores):
        with pytest.raises(KeyError), use_threads(1):
            raise KeyError
        assert torch.get_num_threads() == cores.count_cores() == 4

    def test_the_default_is_what_the_process_may_really_use(self, four_cores):
        with use_threads() as number:
            assert number == 4
        set_quota(four_cores, 2.5)
        with use_threads() as number:
            assert number == torch.get_num_threads() == 2

    def test_what_the_user_has_set_is_left(self, four_cores, monkeypatch):
        set_quota(four_cores, 1)
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        with use_threads() as number:
            assert number == 4
        monkeypatch.delenv("OMP_NUM_THREADS")
        torch.set_num_threads(3)
        set_quota(four_cores, 4)
        with use_threads() as number:
            assert number == 3

    def test_within_another_the_default_is_that_ones(self, four_cores):
        with use_threads(2), use_threads() as number:
            assert number == 2

    @pytest.mark.parametrize("bad", [0, -1, 1.5, "2", True])
    def test_a_number_that_cannot_be_is_refused(self, bad):
        refused = pytest.raises(ValueError, match=r"threads is .*expected a whole number of 1 or more; leave it out")
        with refused, use_threads(bad):
            pass

    def test_more_than_there_are_cores_are_warned_of(self, four_cores):
        with warnings.catch_warnings(record=True) as caught, use_threads(5) as number:
            assert number == torch.get_num_threads() == 5
            assert cores.count_cores() == 4
        (warning,) = caught
        assert warning.category is SSMambaWarning
        assert "5 threads on 4 cores" in str(warning.message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with use_threads(4):
                pass


class TestThreaded:
    def test_an_argument_or_a_setting_says_the_number(self, four_cores):
        @threaded
        def count(config=None, *, threads=None):
            return torch.get_num_threads()

        assert count() == 4
        assert count(threads=2) == 2
        assert count(ExtractPlan(threads=3)) == 3
        assert count(FinetuneConfig(data="tiles", threads=1)) == 1
        assert torch.get_num_threads() == 4

    def test_settings_refuse_bad_numbers(self):
        with pytest.raises(ValueError, match="threads is 0"):
            ExtractPlan(threads=0)
        with pytest.raises(ValueError, match="threads is 0"):
            FinetuneConfig(data="tiles", threads=0)


def test_a_resumed_run_may_change_its_threads():
    assert "threads" in FinetuneConfig.HARMLESS


class TestWaiting:
    @pytest.fixture
    def before_torch(self, monkeypatch):
        monkeypatch.setattr(threads.sys, "modules", {})
        for name in (*threads.WAITING, "OMP_NUM_THREADS"):
            monkeypatch.setenv(name, "")  # so that it is put back
            monkeypatch.delenv(name)

    def test_threads_sleep_unless_the_user_has_decided(self, before_torch):
        spin_briefly()
        assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("passive", "1000")

    @pytest.mark.parametrize("name", threads.WAITING)
    def test_what_the_user_has_decided_stays(self, before_torch, monkeypatch, name):
        monkeypatch.setenv(name, "active")
        spin_briefly()
        assert {key: os.environ.get(key) for key in threads.WAITING if key in os.environ} == {name: "active"}

    def test_once_torch_is_loaded_nothing_is_set(self, before_torch, monkeypatch):
        monkeypatch.setattr(threads.sys, "modules", {"torch": torch})
        spin_briefly()
        start_with_threads(3)
        assert not {*threads.WAITING, "OMP_NUM_THREADS"} & set(os.environ)

    def test_the_number_is_there_when_torch_starts(self, before_torch):
        start_with_threads(3)
        assert os.environ["OMP_NUM_THREADS"] == "3"

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems' torch may have another runtime")
    def test_the_runtime_that_torch_loads_is_told(self, tmp_path):
        """By the runtime's own word."""
        told = {name: value for name, value in os.environ.items() if name not in (*threads.WAITING, "OMP_NUM_THREADS")}
        command = [sys.executable, "-m", "ssmamba_models", "embed", "nowhere", "--out", "f.h5", "--threads", "3"]
        run = subprocess.run(
            command, cwd=tmp_path, env=told | {"OMP_DISPLAY_ENV": "verbose"} | path(), capture_output=True, text=True
        )
        shown = (run.stdout + run.stderr).replace('"', "'")
        assert run.returncode == 2
        assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown
        assert "OMP_NUM_THREADS = '3'" in shown
        if "GOMP_SPINCOUNT" in shown:  # GNU's
            assert "GOMP_SPINCOUNT = '1000'" in shown


def path() -> dict[str, str]:
    """Of this checkout, for a process in another folder."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))}
