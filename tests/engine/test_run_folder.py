"""One training at a time in a run folder, on one machine or several."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ssmamba_models import locks as locks_module
from ssmamba_models.engine import run_folder
from ssmamba_models.engine.pretrain import PretrainConfig
from ssmamba_models.engine.run_folder import open_run

pytest.importorskip("yaml", reason="training needs the [train] extra")

HOLDER = """
import sys, time
from ssmamba_models.engine.pretrain import PretrainConfig
from ssmamba_models.engine.run_folder import open_run
with open_run(sys.argv[1], PretrainConfig(data="tiles"), False):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def config():
    return PretrainConfig(data="tiles")


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def files(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_second_training_is_told_who_is_at_work(holder, config, tmp_path):
    before = files(tmp_path / "run")
    named = rf"being trained by process {holder.pid}; .* another --out"
    with pytest.raises(FileExistsError, match=named), open_run(tmp_path / "run", config, resume=True):
        pass
    assert files(tmp_path / "run") == before


def test_one_that_was_killed_is_no_obstacle(holder, config, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with open_run(tmp_path / "run", config, resume=True) as run:
        assert run == tmp_path / "run"
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_one_that_was_killed_before_its_configuration_is_no_obstacle(config, tmp_path):
    (tmp_path / "run" / ".locks").mkdir(parents=True)
    with open_run(tmp_path / "run", config, resume=False) as run:
        assert (run / "config.yaml").is_file()
    assert not (run / ".locks").exists()


def test_an_error_lets_go(config, tmp_path):
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "run", config, resume=False):
        raise ZeroDivisionError
    with open_run(tmp_path / "run", config, resume=True):
        pass


def held_elsewhere(run, age):
    """A lock of another machine, whose last sign of life is so old."""
    (run / ".locks").mkdir(parents=True)
    lock = run / ".locks" / "run.0.lock"
    lock.write_text(json.dumps({"machine": "node7 pid:[1]", "pid": 42, "started": "1", "time": 0, "token": "a"}))
    os.utime(lock, (time.time() - age,) * 2)


def test_a_machine_that_died_is_waited_for_and_then_replaced(config, tmp_path, monkeypatch):
    """Its job is started again elsewhere before its silence tells that it is dead."""
    monkeypatch.setattr(run_folder, "BEAT", 1.0)
    monkeypatch.setattr(run_folder, "STALE", 3.0)
    monkeypatch.setattr(locks_module.Locks.__init__, "__defaults__", (1.0, 3.0))
    held_elsewhere(tmp_path / "run", age=0)
    said = pytest.warns(UserWarning, match="held by process 42 on node7; waiting 5 s")
    with said, open_run(tmp_path / "run", config, resume=True) as run:
        assert (run / "config.yaml").is_file()
    assert not (run / ".locks").exists()


def test_a_machine_that_lives_keeps_its_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "BEAT", 0.1)
    monkeypatch.setattr(run_folder, "STALE", 0.3)
    held_elsewhere(tmp_path / "run", age=0)
    refused = pytest.raises(FileExistsError, match="process 42 on node7")
    with pytest.warns(UserWarning, match="waiting"), refused, open_run(tmp_path / "run", config, resume=True):
        pass


def test_other_processes_of_a_job_touch_nothing(config, tmp_path):
    with open_run(tmp_path / "run", config, resume=False, main=False) as run:
        assert not run.exists()
