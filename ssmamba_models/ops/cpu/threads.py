"""Running independent tasks of one C call on as many threads as torch uses."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    # A forked child has the pool object but none of its threads, and perhaps a lock that nobody will release.
    global _lock, _pool, _pool_size
    _lock, _pool, _pool_size = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _executor(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            # A smaller pool that is still in use elsewhere finishes its work and is then collected.
            _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="ssmamba"), size
        return _pool


def run_tasks(function, arguments_address: int, tasks: int, cost: float) -> None:
    """Call `function(arguments_address, begin, end)` over [0, tasks), which ctypes runs without the GIL.

    Args:
        cost: rough number of element operations in all tasks; little work is not worth waking threads for.

    Raises:
        MemoryError: a call could not allocate its scratch memory.
    """
    threads = min(torch.get_num_threads(), tasks, max(1, int(cost // 20_000)))
    if threads <= 1:
        codes = [function(arguments_address, 0, tasks)]
    else:
        edges = [tasks * i // threads for i in range(threads + 1)]
        pool = _executor(threads - 1)
        futures = [pool.submit(function, arguments_address, *edges[i : i + 2]) for i in range(1, threads)]
        codes = [function(arguments_address, edges[0], edges[1])]
        codes += [future.result() for future in futures]
    if any(codes):
        raise MemoryError("the C scan kernels could not allocate their scratch memory: use smaller images or batches")
