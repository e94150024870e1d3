"""Options that several commands share, put on a command all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def add_options(options: Sequence[Callable], command: Callable) -> Callable:
    """Put click's options on a command, so that its help lists them in this order."""
    for option in reversed(options):
        command = option(command)
    return command
