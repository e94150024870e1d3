"""Extraction on a real Ray cluster of this machine, one of whose processes is killed in the middle of a slide."""

import builtins
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")

from job_cases import digests, disc, events, extract, leftovers
from slide_files import make_empty_file, make_pyramid

from ssmamba_models.wsi import ray_engine
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.held_slide import Outcome
from ssmamba_models.wsi.local_engine import Timing

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def cluster(monkeypatch):
    ray = pytest.importorskip("ray", reason="clusters need the [cluster] extra")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    yield ray
    ray.shutdown()


def first_owner(out, deadline=120):
    """The process that has a slide half-written, by its lock."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        if list(out.rglob(".*.part.h5")):
            slide = next(out.rglob(".*.part.h5")).name.split(".")[1]
            for path in out.glob(f".locks/{slide}.*.lock"):
                return slide, json.loads(path.read_text())["pid"]
        time.sleep(0.01)
    raise AssertionError("no slide was begun")


@pytest.mark.slow
def test_a_killed_process_costs_nothing(cluster, tmp_path):
    slides, out = tmp_path / "slides", tmp_path / "job"
    slides.mkdir()
    for name in "ab":
        make_pyramid(slides / f"{name}.tif", (1600, 1400), mpp=0.5, content=disc)
    make_empty_file(slides / "zero.svs")
    settings = {"batch_size": 1}
    results = []

    def work():
        results.append(extract(slides, out, engine="ray", num_cpus=1, **settings))

    thread = threading.Thread(target=work)
    thread.start()
    slide, pid = first_owner(out)
    assert pid != os.getpid()
    os.kill(pid, signal.SIGKILL)
    thread.join(300)
    (result,) = results
    assert (sorted(result.done), list(result.failed)) == (["a", "b"], ["zero"])
    assert "empty" in result.failed["zero"]
    assert result.timing.tiles > 0
    assert events(out, "started").count(slide) == 2
    assert sorted(events(out, "done")) == ["a", "b"]
    extract(slides, tmp_path / "whole", **settings)
    assert digests(out) == digests(tmp_path / "whole")
    assert leftovers(out) == []


class _OneTask:
    """Of Ray what the engine asks for; a task is not run, but what it is told is kept."""

    def __init__(self):
        self.told = []

    def is_initialized(self):
        return True

    def remote(self, function):
        return self

    def options(self, **wanted):
        return SimpleNamespace(remote=lambda *told: self.told.append(told) or 0)

    def wait(self, waiting):
        return waiting, []

    def get(self, ready):
        return Outcome("a", "done"), Timing()


def test_tasks_are_told_whole_paths(tmp_path, monkeypatch):
    ray = _OneTask()
    monkeypatch.setattr(ray_engine, "require_ray", lambda: ray)
    monkeypatch.chdir(tmp_path)
    job, claims = SimpleNamespace(root="job"), SimpleNamespace(todo=["a"])
    plan = ExtractPlan(checkpoint="run/weights.safetensors", engine="ray")
    assert [outcome.slide for outcome in ray_engine.run_on_ray(job, claims, plan, Timing())] == ["a"]
    ((_, root, told),) = ray.told
    assert (root, told.checkpoint) == (str(tmp_path / "job"), str(tmp_path / "run" / "weights.safetensors"))


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *rest, **more)

    make_pyramid(tmp_path / "a.tif", (256, 256), mpp=0.5, levels=(1,))
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"ssmamba-models\[cluster\]"):
        extract(tmp_path / "a.tif", tmp_path / "job", engine="ray")
    assert not (tmp_path / "job").exists()


COMMAND = """
import signal, sys

# A shell's background job ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
from ssmamba_models.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_ends_it_with_the_exit_code_of_all_commands(tmp_path, sign, code):
    pytest.importorskip("ray", reason="clusters need the [cluster] extra")
    make_pyramid(tmp_path / "a.tif", (6000, 6000), mpp=0.5, content=disc)
    out = tmp_path / "job"
    arguments = ("extract", tmp_path / "a.tif", "--out", out, "--engine", "ray", "--model", "test_ssmamba")
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments), "--batch-size", "1", "--quiet"],
        env={**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        first_owner(out)
        process.send_signal(sign)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, said
