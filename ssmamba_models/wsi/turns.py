"""Whether tiles are read while the model computes, or in turn with it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from ssmamba_models.cores import count_cores

# Reading in turn is given up where it takes more than this share of the time, judged from so many batches on.
_LONG_READING, _LEAST_BATCHES = 0.15, 4


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
        self._reading, self._computing, self._batches = 0.0, 0.0, 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around what waits for tiles."""
        start = time.perf_counter()
        yield
        self._reading += time.perf_counter() - start

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around what computes a batch."""
        start = time.perf_counter()
        yield
        self._computing += time.perf_counter() - start
        self._batches += 1
        if self._batches >= _LEAST_BATCHES and self._reading > _LONG_READING * (self._reading + self._computing):
            self.kept = False


def takes_all_cores(device: torch.device) -> bool:
    """Whether a model on it computes on every core that this process may use."""
    return device.type == "cpu" and torch.get_num_threads() >= count_cores()
