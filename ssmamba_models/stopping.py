"""Ending in order when a cluster or a person asks for it: SIGTERM unwinds as Ctrl-C does, and neither tears a write."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Launchers and `srun` send the signal on to a process that has had it; a person who means it comes later.
_SAME_S = 2.0
# What a shell expects of a process that SIGTERM ended.
_EXIT_CODE = 128 + signal.SIGTERM


@contextmanager
def stopped_in_order() -> Iterator[None]:
    """Let SIGTERM (a cluster's preemption) end the block as Ctrl-C does: locks released, part files removed.

    Another one within two seconds does not disturb the cleaning up.

    Raises:
        SystemExit: the signal came; the exit code is 143, as a shell expects.
    """
    if not _in_main_thread():
        yield
        return
    first: list[float] = []

    def stop(number: int, frame: object) -> None:
        now = time.monotonic()
        if not first or now - first[0] > _SAME_S:
            first[:] = [now]
            raise SystemExit(_EXIT_CODE)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit as error:
        # Ray, where it is waited for, makes of ours one of its own.
        if first and error.code != _EXIT_CODE:
            raise SystemExit(_EXIT_CODE) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stops_wait() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C wait until the block, which is to be short, is done; then they act as they would have.

    For writes through HDF5, which calls Python back from places where an exception is swallowed: the stop would be
    lost, and rows of the file with it.
    """
    if not _in_main_thread():
        yield
        return
    came: list[int] = []
    # None: a handler that C code has set, which Python cannot put back.
    mine = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in mine}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _in_main_thread() -> bool:
    """Signals reach Python in its main thread alone; no other one may choose what they do."""
    return threading.current_thread() is threading.main_thread()
