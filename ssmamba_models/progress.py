"""Progress on stderr: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm

_TERMINAL_SECONDS, _LOG_SECONDS = 0.1, 30


def progress_bar(
    what: str, unit: str, show: bool, *, total: int | None = None, items: Iterable | None = None, done: int = 0
) -> tqdm:
    """A bar, to be used as a context, or to be run through where it is given items.

    Args:
        what: its name.
        unit: what it counts, in the singular.
        show: whether it is drawn at all.
        total: how many there are, where `items` does not tell.
        items: what is run through.
        done: how many were done before.
    """
    interval = _TERMINAL_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
    return tqdm(items, total=total, initial=done, unit=unit, desc=what, disable=not show, mininterval=interval)
