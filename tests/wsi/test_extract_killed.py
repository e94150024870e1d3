"""kill -9, wherever it strikes: the job that goes on ends with the bytes of one that was never broken."""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")

from job_cases import digests, disc, events, leftovers
from job_server import Jobs
from slide_files import make_pyramid

from ssmamba_models.wsi.status import read_summary

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the jobs are forks")


@pytest.fixture(scope="module")
def jobs():
    jobs = Jobs()
    yield jobs
    jobs.close()


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed") / "slides"
    folder.mkdir()
    for index, name in enumerate("abc"):
        make_pyramid(folder / f"{name}.tif", (1280, 760 + 120 * index), mpp=0.5, content=disc)
    return folder


@pytest.fixture(scope="module")
def whole(jobs, slides, tmp_path_factory):
    """An unbroken job: its folder, seconds, and touches of its files."""
    out = tmp_path_factory.mktemp("whole") / "job"
    jobs.start(slides, out)
    start = time.monotonic()
    assert jobs.wait() == 0
    return out, time.monotonic() - start, jobs.said["touches"]


def assert_same(out, whole):
    assert digests(out) == digests(whole)
    assert leftovers(out) == []
    assert sorted(events(out, "done")) == ["a", "b", "c"]
    assert {row["status"] for row in read_summary(out / "summary.csv").values()} == {"done"}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["by the clock", "at a touch of a file"])
def test_twenty_kills(jobs, slides, whole, tmp_path, way):
    """Ten in each way, on as many jobs as it takes; each is gone on with until it is whole."""
    unbroken, seconds, touches = whole
    dice, kills, job = random.Random(way), 0, 0
    while kills < 10:
        out, runs = tmp_path / f"job{job}", 0
        while True:
            last = kills == 10
            kill_at = dice.randint(1, touches) if way.startswith("at") and not last else None
            pid = jobs.start(slides, out, kill_at)
            if way.startswith("by") and not last:
                time.sleep(dice.uniform(0, seconds))
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(pid, signal.SIGKILL)
            code, runs = jobs.wait(), runs + 1
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                break
            kills += 1
        assert_same(out, unbroken)
        job += 1
    assert kills == 10


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_decoding_processes_end_with_their_job(jobs, slides, tmp_path):
    pid = jobs.start(slides, tmp_path / "job", workers=2)
    children, deadline = [], time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        children = [child for child in os.listdir("/proc") if child.isdecimal() and _parent(child) == pid]
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    jobs.wait()
    assert children
    deadline = time.monotonic() + 30
    while any(_runs(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(child) for child in children)


def _parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
def test_two_processes_share_a_job(slides, whole, tmp_path):
    """Started at once on one folder: each slide is done by one of them."""
    first, second = Jobs(), Jobs()
    try:
        out = tmp_path / "job"
        pids = {first.start(slides, out, shard=[1, 2]), second.start(slides, out, shard=[2, 2])}
        assert (first.wait(), second.wait()) == (0, 0)
    finally:
        first.close(), second.close()
    assert_same(out, whole[0])
    lines = [json.loads(line) for line in (out / "status.jsonl").open()]
    done = {line["slide"]: line["pid"] for line in lines if line["status"] == "done"}
    started = {line["slide"]: line["pid"] for line in lines if line["status"] == "started"}
    assert done == started
    assert set(done.values()) <= pids
