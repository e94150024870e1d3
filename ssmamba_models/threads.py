"""CPU threads: how many a computation may use, and how they wait for one another.

Threads of an OpenMP runtime wait for the next parallel region by spinning for some milliseconds. Where other processes
want the same cores, a thread that spins takes the time that the thread it waits for needs: with five processes per core
two threads were ten times slower than one. If they spin for some microseconds only and then sleep, they were at most
1.3 times slower. The runtime reads how to wait once, when torch loads it: the `ssmamba` command asks for it
(`spin_briefly`) before that. A Python program has to do so itself, at its top or in its environment::

    import os
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported
    import torch
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from ssmamba_models.cores import count_cores, limited_cores
from ssmamba_models.notice import SSMambaWarning

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# What decides how threads wait, in GNU's, LLVM's and Intel's runtimes.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_NUMBER = "OMP_NUM_THREADS"
# Measured on two cores. A training step of ssmamba_tiny (8 images, 96 px), which has many short regions, on free cores:
# 1.23 times as long without any spinning as with the runtime's 300000 spins, 1.1 times with 1000. On cores that five
# processes want, as times of one thread: 1.0 with none, 1.25 with 1000, 3 with 10000.
_SPINS = 1000


@contextmanager
def use_threads(threads: int | None = None) -> Iterator[int]:
    """Compute on so many CPU threads within the block, and start no more worker processes by default.

    Sets torch's number of threads inside an operator and the cores that `ssmamba_models.cores` counts, from which the
    defaults of `workers` follow, and puts both back.

    Args:
        threads: how many; None takes torch's own number (or OMP_NUM_THREADS), but no more than the cores that this
            process may use by its affinity and its CPU quota.

    Yields:
        The number of threads.

    Raises:
        ValueError: no whole number of 1 or more.

    Warns:
        SSMambaWarning: more threads than cores.

    Example:
        >>> with use_threads(2):
        ...     features = model(images)
    """
    import torch

    before, number = torch.get_num_threads(), check_threads(threads)
    if number is None:
        number = before if _NUMBER in os.environ else min(before, count_cores())
    elif number > before and number > (cores := count_cores()):
        warnings.warn(
            f"{number} threads on {cores} core{'' if cores == 1 else 's'} that this process may use: they wait for "
            "one another, fewer are faster",
            SSMambaWarning,
            stacklevel=3,
        )
    with limited_cores(threads):
        _set(number)
        try:
            yield number
        finally:
            _set(before)


def _set(threads: int) -> None:
    import torch

    # Even the number that is in force may rebuild the pool.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def check_threads(threads: int | None) -> int | None:
    """`threads` if it is None or a whole number of 1 or more (ValueError: it is not)."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(
            f"threads is {threads!r}, expected a whole number of 1 or more; leave it out for all cores that this "
            "process may use"
        )
    return threads


def threaded(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator: the function runs within `use_threads` of its argument `threads`, or of the attribute `threads` of
    its argument (a config or a plan)."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        arguments = signature.bind(*args, **kwargs).arguments
        settings = next((value for value in arguments.values() if hasattr(value, "threads")), None)
        with use_threads(arguments.get("threads", getattr(settings, "threads", None))):
            return function(*args, **kwargs)

    return run


def spin_briefly() -> None:
    """Have threads that wait spin for some microseconds and then sleep, in this process and its children.

    Of no effect once torch is loaded, or where OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME is set: the user has
    decided.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        # The first says what the second, which GNU's runtime alone knows, does not: LLVM's and Intel's sleep at once.
        os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT=str(_SPINS))


def start_with_threads(threads: int) -> None:
    """Have torch, NumPy's BLAS and child processes start with so many threads; of no effect once torch is loaded."""
    if "torch" not in sys.modules:
        os.environ[_NUMBER] = str(threads)
