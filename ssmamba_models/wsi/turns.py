"""Whether tiles are read while the model computes, or in turn with it."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ssmamba_models.cores import count_physical_cores
from ssmamba_models.engine.processes import default_workers

# Reading in turn is given up where it takes more than this share of a turn's time: of most of the last turns, since now
# and then one waits for something else (a slide is opened, its tissue is looked for, a disk wakes up).
_LONG_READING, _LEAST_TURNS, _LAST_TURNS = 0.15, 5, 15


class Turns:
    """Reading and computing in turn, for a model that computes on all cores.

    A core that reads meanwhile makes the others wait for it at the end of every operator, which costs twice what it
    reads; in turn, all cores read a batch in little time. Where that takes long after all (files far away, a fast
    model), tiles are better read ahead.

    Args:
        device: the model's.

    Attributes:
        kept: whether they take turns.
    """

    def __init__(self, device: torch.device):
        self.kept = takes_all_cores(device)
        self._reading, self._computing = 0.0, 0.0
        self._shares: deque[float] = deque(maxlen=_LAST_TURNS)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what waits for tiles, of one batch or several; it begins a turn."""
        self._judge()
        start = time.perf_counter()
        yield
        self._reading = time.perf_counter() - start

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around what computes a batch of this turn; storing its features is neither."""
        start = time.perf_counter()
        yield
        self._computing += time.perf_counter() - start

    def _judge(self) -> None:
        """Count the turn that ended, if one did that computed anything."""
        if self._computing:
            self._shares.append(self._reading / (self._reading + self._computing))
            self._reading, self._computing = 0.0, 0.0
        if len(self._shares) >= _LEAST_TURNS and statistics.median(self._shares) > _LONG_READING:
            self.kept = False


def takes_all_cores(device: torch.device) -> bool:
    """Whether a model on it computes on every core that this process may use.

    Hyper-threads do not count: torch starts a thread for each core, and a second one on a core slows the first.
    """
    return device.type == "cpu" and torch.get_num_threads() >= count_physical_cores()


def default_readers(device: torch.device) -> int:
    """How many processes read tiles for a model on a device: in turn with it, all cores may."""
    return default_workers(None if takes_all_cores(device) else device, 1)
