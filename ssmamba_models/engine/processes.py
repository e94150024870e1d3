"""The processes of a training: `accelerate launch` or torchrun starts them, here they find each other."""

from __future__ import annotations

import atexit
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ssmamba_models.cores import count_cores
from ssmamba_models.engine.device import resolve_device

if TYPE_CHECKING:
    from accelerate import Accelerator

# Long beside what a thread needs to let go of its last work, short beside a training.
_LAST_WORK_S = 0.5


def create_accelerator(device: str | None) -> Accelerator:
    """Join the other processes (gloo on CPUs, NCCL on GPUs), or be the only one.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None takes a GPU where there is one. Of several processes each takes the
            GPU of its number.

    Raises:
        ValueError: the device cannot be used.
        ImportError: accelerate is missing.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError('training needs accelerate; pip install "ssmamba-models[train]"') from error
    place = resolve_device(device)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    # Autocast is ours: accelerate fixes its precision for the life of the process.
    _forget_other_device(place)
    accelerator = Accelerator(cpu=place.type == "cpu", mixed_precision="no")
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)
    return accelerator


def _forget_other_device(place: torch.device) -> None:
    """accelerate keeps the device of a process's first training for all others.

    Raises:
        ValueError: it cannot be changed any more, as several processes have met on it.
    """
    from accelerate.state import AcceleratorState, PartialState

    if not PartialState._shared_state:
        return
    known = PartialState()
    if known.device.type == place.type:
        return
    if known.num_processes > 1:
        raise ValueError(
            f"device is {place.type}, but the processes of this training have met on {known.device.type}; start them "
            "anew for another device"
        )
    AcceleratorState._reset_state(reset_partial_state=True)


def _leave_group() -> None:
    """Join gloo's threads while Python still runs: left to the destructors at exit, a process that has done all its
    work now and then aborts ("terminate called without an active exception", exit code -6). NCCL's leaving waits for
    the other processes, which may be waiting themselves, so that one is left to its destructors.

    Leaving holds Python's lock while it joins the threads (torch 2.6), and a thread that has just ended its last work
    asks for that lock to let go of a tensor: both would wait for ever. Asleep this thread does not hold it.
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_backend() == "gloo":
        time.sleep(_LAST_WORK_S)
        group.destroy_process_group()


def default_workers(device: torch.device | None, processes: int) -> int:
    """How many processes read tiles for each training process; without a device nothing else computes."""
    # On a CPU the model needs the cores itself, and one process reads faster than it computes.
    return 1 if device is not None and device.type == "cpu" else min(8, max(1, count_cores() // processes))


class StopSignals:
    """Remembers SIGTERM and SIGINT, so that a training can end in order; another one, two seconds later,
    ends it at once.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.since = 0.0

    @contextlib.contextmanager
    def caught(self) -> Iterator[StopSignals]:
        """Within the block signals are remembered; only a process's main thread can do that, others let them be."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.received is None:
            self.received, self.since = number, time.monotonic()
        # Ctrl-C comes twice to what torchrun started: from the terminal and from torchrun.
        elif time.monotonic() - self.since > 2:
            raise KeyboardInterrupt


def ignore_stop_signals(worker: int) -> None:
    """For processes that read tiles (`worker_init_fn`): Ctrl-C reaches them too, and the step needs their tiles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
