"""Fair timing on machines that other people use at the same time.

All contenders of a case are timed in turn, round after round (A B C A B C ...), so that a neighbour's load or
a drop of the clock rate hits them alike. A sample is many calls long where one call is short; a result is the
median of the samples with its quartiles, and a ratio is the median of the ratios within each round.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

SAMPLE_MS = 20.0  # long enough for the timer's and the scheduler's grain to vanish in it
MIN_ROUNDS = 3  # below this a median says nothing; kept even when the budget is spent
LONG_CALL_MS = 1000.0  # calls longer than this are not called a second time just to be calibrated

# Larger than any GPU's last-level cache: zeroed before each call, so that inputs come from memory.
CUDA_FLUSH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Attributes:
        samples_ms: one entry per round, milliseconds per call.
        repeats: calls in one sample.
    """

    samples_ms: tuple[float, ...]
    repeats: int

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """Lower and upper quartile; both are the sample itself where there is only one."""
        if len(self.samples_ms) == 1:
            return self.samples_ms[0], self.samples_ms[0]
        lower, _, upper = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return lower, upper

    def as_dict(self) -> dict:
        """For a JSON report; times in milliseconds per call."""
        return {
            "median_ms": self.median_ms,
            "quartiles_ms": list(self.quartiles_ms),
            "rounds": len(self.samples_ms),
            "repeats": self.repeats,
            "samples_ms": list(self.samples_ms),
        }


def speedup(contender: Timing, baseline: Timing) -> float:
    """How many times faster `contender` is than `baseline`: the median over rounds of baseline / contender.

    Both must come from one `time_interleaved`, whose rounds pair their samples.
    """
    if len(contender.samples_ms) != len(baseline.samples_ms):
        raise ValueError(
            f"speedup compares timings of the same rounds, got {len(contender.samples_ms)} and "
            f"{len(baseline.samples_ms)} samples; take both from one time_interleaved"
        )
    return statistics.median(b / c for b, c in zip(baseline.samples_ms, contender.samples_ms))


class CpuClock:
    """Wall-clock time."""

    def milliseconds(self, call: Call, repeats: int) -> float:
        """Total time of `repeats` calls."""
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3


class CudaClock:
    """Time between CUDA events around each call, on caches emptied before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(CUDA_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def milliseconds(self, call: Call, repeats: int) -> float:
        """Total time of `repeats` calls.

        Emptying the cache lies outside the events, and lasts long enough for the host to have queued the
        call's kernels by the time that the device reaches the first event.
        """
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        for start, end in zip(starts, ends):
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self._device)
        return sum(start.elapsed_time(end) for start, end in zip(starts, ends))


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    """The clock that sees all of the work queued on `device`."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 7,
    sample_ms: float = SAMPLE_MS,
    budget_s: float = 60.0,
) -> dict[str, Timing]:
    """Time every contender, taking turns.

    Args:
        calls: name -> function without arguments; it must leave no work queued on another device.
        device: where the work runs; CUDA is timed with events, anything else with the wall clock.
        rounds: samples per contender.
        sample_ms: least length of one sample, in milliseconds; short calls are repeated to fill it.
        budget_s: seconds, warm-up included, after which no round begins (`MIN_ROUNDS` are always run).

    Returns:
        name -> `Timing`, all with the same number of samples.

    Raises:
        ValueError: if `rounds` is less than one.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    deadline = time.monotonic() + budget_s
    clock = clock_for(torch.device(device))
    with _no_garbage_collection():
        repeats = {name: _calibrate(clock, call, sample_ms) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for done in range(rounds):
            if done >= MIN_ROUNDS and time.monotonic() > deadline:
                break
            for name, call in calls.items():
                samples[name].append(clock.milliseconds(call, repeats[name]) / repeats[name])
    return {name: Timing(tuple(samples[name]), repeats[name]) for name in calls}


def best_of(call: Call, *, device: torch.device | str = "cpu", tries: int = 3) -> float:
    """A quick estimate: the shortest of `tries` calls after one to warm up, in milliseconds."""
    clock = clock_for(torch.device(device))
    clock.milliseconds(call, 1)
    return min(clock.milliseconds(call, 1) for _ in range(tries))


def _calibrate(clock: CpuClock | CudaClock, call: Call, sample_ms: float) -> int:
    """Warm up (compilation, page faults, caches), and find the calls that fill a sample."""
    if clock.milliseconds(call, 1) > LONG_CALL_MS:
        return 1
    repeats = 1
    while True:
        elapsed = clock.milliseconds(call, repeats)
        wanted = math.ceil(repeats * sample_ms / max(elapsed, 1e-6))
        if wanted <= 2 * repeats:
            return max(1, wanted)
        repeats = min(wanted, 10 * repeats)  # by steps: the first calls are slower than those to come


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a sample would be charged to whoever was running."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
