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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

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


def _executor(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            # A smaller pool that is still in use elsewhere finishes its work and is then collected.
            _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="ssmamba"), size
        return _pool


@functools.cache
def _openmp() -> tuple[int | None, ...] | None:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in torch's OpenMP runtime, or None.

    GNU's runtime has these, and so have LLVM's and Intel's. Only the copy that lies in torch's own folder will do:
    other packages bring other copies, with other threads.
    """
    # As the system names files: without links.
    folder = os.path.realpath(os.path.join(os.path.dirname(torch.__file__), "lib"))
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps}
        inside = sorted(
            path for path in paths if os.path.dirname(path) == folder and "omp" in os.path.basename(path)
        )
        runtime = ctypes.CDLL(inside[0])
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        return tuple(ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in names)
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
    elif not _forked and (runtime := _openmp()) is not None:
        address = ctypes.cast(kernel, ctypes.c_void_p)
        failed = library.ssmamba_team_run(*runtime, threads, address, arguments_address, tasks)
    else:
        failed = _run_on_pool(kernel, arguments_address, tasks, min(threads, tasks))
    if failed:
        raise MemoryError("the C scan kernels could not allocate their scratch memory: use smaller images or batches")


def _run_on_pool(kernel: Callable[..., int], arguments_address: int, tasks: int, threads: int) -> int:
    edges = [tasks * i // threads for i in range(threads + 1)]
    pool = _executor(threads - 1)
    futures = [pool.submit(kernel, arguments_address, *edges[i : i + 2]) for i in range(1, threads)]
    codes = [kernel(arguments_address, edges[0], edges[1])]
    codes += [future.result() for future in futures]
    return int(any(codes))
