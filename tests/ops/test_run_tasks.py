"""Tasks of a C call are handed out to threads one chunk after another, until none is left."""

from __future__ import annotations

import ctypes
import threading

import pytest

from ssmamba_models.ops.cpu import threads as cpu_threads
from ssmamba_models.ops.cpu.library import open_library
from ssmamba_models.ops.cpu.threads import run_tasks

KERNEL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
MUCH = 1e9  # worth waking threads for


@pytest.fixture(params=["openmp", "pool"])
def run(request, threads, monkeypatch):
    """A function: run a Python function as the kernel of so many tasks, on so many threads."""
    library, reason = open_library()
    if library is None:
        pytest.skip(reason)
    if request.param == "openmp" and cpu_threads._openmp() is None:
        pytest.skip("torch's OpenMP runtime cannot be reached")
    monkeypatch.setattr(cpu_threads, "_forked", request.param == "pool")

    def run(kernel, tasks, count):
        threads(count)

        class Library:
            ssmamba_team_run = library.ssmamba_team_run
            function = KERNEL(lambda arguments, begin, end: kernel(begin, end))

        run_tasks(Library, "function", 0, tasks, MUCH)

    return run


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("tasks", [1, 2, 7, 16, 1000])
def test_every_task_is_done_once(run, tasks, count):
    done = []
    run(lambda begin, end: done.extend(range(begin, end)) or 0, tasks, count)
    assert sorted(done) == list(range(tasks))


def test_a_thread_that_is_held_up_holds_up_one_chunk(run):
    """The others do all else meanwhile; with equal shares they would wait for ever."""
    tasks, done, others_done, guard = 100, [], threading.Event(), threading.Lock()

    def kernel(begin, end):
        if begin == 0:
            return 0 if others_done.wait(60) else -1
        with guard:
            done.extend(range(begin, end))
            if len(done) >= tasks * 0.9:
                others_done.set()
        return 0

    run(kernel, tasks, 2)


def test_a_task_that_fails_is_told_and_the_others_are_done(run):
    done = []

    def kernel(begin, end):
        done.extend(range(begin, end))
        return -1 if begin == 0 else 0

    with pytest.raises(MemoryError, match="scratch memory"):
        run(kernel, 50, 2)
    assert sorted(done) == list(range(50))
