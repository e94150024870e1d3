"""Running independent tasks of one C call on as many threads as torch uses.

On torch's own OpenMP threads where they can be reached: they spin for a while after every torch operator, and a pool
of ours would fight them for the cores (measured on two cores: 1.2 ms for a scan that takes 2.2 ms on a pool of its
own, right after a matrix product). Else, and in forked children, where OpenMP must not be used, on a thread pool.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

# Chunks of work for each thread: a few more calls of a kernel against less waiting for the last one.
_CHUNKS = 8

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_forked = False


def _after_fork() -> None:
    # A forked child has the pool object but none of its threads, and perhaps a lock that nobody will release.
    global _lock, _pool, _pool_size, _forked
    _lock, _pool, _pool_size, _forked = threading.Lock(), None, 0, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def one_thread_after_fork() -> Iterator[None]:
    """Run torch's own operators in a forked child on one thread: OpenMP, used before the fork, would wait for ever."""
    threads = torch.get_num_threads()
    if not _forked or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _executor(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            # A smaller pool that is still in use elsewhere finishes its work and is then collected.
            _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="ssmamba"), size
        return _pool


@functools.cache
def _openmp() -> int | None:
    """Address of GOMP_parallel in torch's OpenMP runtime, or None.

    GNU's runtime has it, and so have LLVM's and Intel's. Only the copy that lies in torch's own folder will do: other
    packages bring other copies, with other threads.
    """
    # As the system names files: without links.
    folder = os.path.realpath(os.path.join(os.path.dirname(torch.__file__), "lib"))
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps}
        inside = sorted(
            path for path in paths if os.path.dirname(path) == folder and "omp" in os.path.basename(path)
        )
        return ctypes.cast(ctypes.CDLL(inside[0]).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, IndexError, AttributeError):
        return None


def run_tasks(library: ctypes.CDLL, function: str, arguments_address: int, tasks: int, cost: float) -> None:
    """Call the library's `function(arguments, begin, end)` over [0, tasks), which ctypes runs without the GIL.

    Args:
        cost: rough number of element operations in all tasks; little work is not worth waking threads for.

    Raises:
        MemoryError: a call could not allocate its scratch memory.
    """
    kernel = getattr(library, function)
    threads = torch.get_num_threads()
    if threads == 1 or tasks == 1 or cost < 40_000:
        failed = kernel(arguments_address, 0, tasks)
    else:
        # A thread that another process keeps from its core holds up one chunk of the work, not a whole share.
        chunk = -(-tasks // (_CHUNKS * threads))
        if not _forked and (parallel := _openmp()) is not None:
            address = ctypes.cast(kernel, ctypes.c_void_p)
            failed = library.ssmamba_team_run(parallel, threads, address, arguments_address, tasks, chunk)
        else:
            failed = _run_on_pool(kernel, arguments_address, tasks, chunk, min(threads, tasks))
    if failed:
        raise MemoryError("the C scan kernels could not allocate their scratch memory: use smaller images or batches")


def _run_on_pool(kernel: Callable[..., int], arguments_address: int, tasks: int, chunk: int, threads: int) -> int:
    starts = iter(range(0, tasks, chunk))

    def work() -> int:
        failed = 0
        for start in starts:
            failed |= kernel(arguments_address, start, min(start + chunk, tasks))
        return failed

    futures = [_executor(threads - 1).submit(work) for _ in range(threads - 1)]
    codes = [work()]
    # All chunks are taken: a thread that has not begun by now need not begin.
    codes += [future.result() for future in futures if not future.cancel()]
    return int(any(codes))
