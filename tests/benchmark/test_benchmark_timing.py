"""The clock and the order of play; nothing here judges how long anything took."""

import pytest
import torch

from ssmamba_models.benchmark import timing
from ssmamba_models.benchmark.timing import CudaClock, Timing, speedup, time_interleaved


class ScriptedClock:
    """Says that a call takes a millisecond, and writes down whose turn it was."""

    def __init__(self):
        self.turns = []

    def milliseconds(self, call, repeats):
        for _ in range(repeats):
            call()
        self.turns.append((call.__name__, repeats))
        return 1.0 * repeats


@pytest.fixture
def clock(monkeypatch):
    clock = ScriptedClock()
    monkeypatch.setattr(timing, "clock_for", lambda device: clock)
    return clock


def a():
    pass


def b():
    pass


def test_contenders_take_turns(clock):
    timings = time_interleaved({"a": a, "b": b}, rounds=3, sample_ms=20)
    assert clock.turns[-6:] == [("a", 20), ("b", 20)] * 3
    assert timings["a"] == Timing((1.0, 1.0, 1.0), 20)


def test_spent_budget_leaves_the_least_number_of_rounds(clock):
    timings = time_interleaved({"a": a, "b": b}, rounds=9, budget_s=0.0)
    assert len(timings["a"].samples_ms) == len(timings["b"].samples_ms) == timing.MIN_ROUNDS


def test_long_calls_are_not_repeated(clock):
    clock.milliseconds = lambda call, repeats: 2000.0 * repeats
    assert time_interleaved({"a": a}, rounds=1)["a"].repeats == 1


def test_real_clock_measures_a_positive_time():
    assert time_interleaved({"a": a}, rounds=2, sample_ms=1)["a"].median_ms > 0


def test_rounds_below_one_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        time_interleaved({"a": a}, rounds=0)


def test_median_and_quartiles():
    timed = Timing((4.0, 1.0, 3.0, 2.0, 5.0), 1)
    assert timed.median_ms == 3.0
    assert timed.quartiles_ms == (2.0, 4.0)
    assert Timing((7.0,), 1).quartiles_ms == (7.0, 7.0)


def test_speedup_pairs_the_rounds():
    # A neighbour doubled every time of the second round: the ratio within the rounds does not move.
    assert speedup(Timing((1.0, 2.0, 1.0), 1), Timing((3.0, 6.0, 3.0), 1)) == 3.0
    with pytest.raises(ValueError, match="same rounds"):
        speedup(Timing((1.0,), 1), Timing((1.0, 2.0), 1))



def test_cuda_clock_empties_the_cache_outside_the_events(monkeypatch):
    """With stand-ins for events and the flush buffer: the order is flush, start, call, end."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 1.5

    class Buffer:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Buffer())
    clock = CudaClock(torch.device("cuda"))
    assert clock.milliseconds(lambda: log.append("call"), 2) == 3.0
    assert log == ["flush", "event", "call", "event"] * 2 + ["synchronize"]
