"""The time of a training: in all, since the last log line, since the last checkpoint, and waiting for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Measures a training.

    Args:
        before: seconds that it took in earlier lives.
        seen: images that it saw in them.
        counted: what they are called where they are something else.
    """

    def __init__(self, before: float, seen: int, counted: str = "images"):
        self.start = time.perf_counter() - before
        self.lap_start = self.save_time = time.perf_counter()
        self.waited, self.lap_seen, self.counted = 0.0, seen, counted

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def since_save(self) -> float:
        return time.perf_counter() - self.save_time

    def saved(self) -> None:
        self.save_time = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def lap(self, seen: int) -> dict[str, float]:
        """Speed since the last call: images per second, and the share of the time spent waiting for data."""
        now = time.perf_counter()
        passed = max(now - self.lap_start, 1e-9)
        speed = {
            f"{self.counted}_per_second": round((seen - self.lap_seen) / passed, 2),
            "data_wait": round(self.waited / passed, 4),
            "seconds": round(now - self.start, 3),
        }
        self.lap_start, self.lap_seen, self.waited = now, seen, 0.0
        return speed
