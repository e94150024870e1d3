"""Ending in order when a cluster asks for it: SIGTERM unwinds as Ctrl-C does, so that nothing is left half-written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stopped_in_order() -> Iterator[None]:
    """Let SIGTERM (a cluster's preemption) end the block as Ctrl-C does: locks released, part files removed.

    Raises:
        SystemExit: the signal came; the exit code is 143, as a shell expects.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
