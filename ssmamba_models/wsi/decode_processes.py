"""Processes that decode tiles for the model: a killed one costs a retry, never the job, and never a hang.

Each is a Python of its own that does without torch, spoken to through pipes. It ends when its pipe does, so that none
outlives a job that was killed. (A fork of a process that runs torch may hang in its thread pools; multiprocessing's
spawn runs the user's script again.)
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from ssmamba_models.notice import one_line
from ssmamba_models.wsi.decoding import Answer, Decoder, Task

# How often a task is tried whose process dies under it: what kills one (memory, mostly) may have passed.
_TRIES = 2

_START = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too; who asked decides when we end
import sys
sys.path[:] = {path!r}
from ssmamba_models.wsi.decode_processes import serve
serve()
"""


class DecoderDied(OSError):
    """A decoding process ended before it answered."""


class Decoders:
    """Some decoding processes, started when they are needed or by `start`; close it, or use it in a `with` block.

    Args:
        workers: how many; 0 decodes in a thread of this process.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._threads = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="decode")
        self._own = threading.local()
        self._processes: list[_Process] = []
        self._idle: list[_Process] = []
        self._guard = threading.Lock()
        self._closed = False

    def start(self) -> None:
        """Start the processes now, to be ready by the first task: a second that a model takes to load as well."""
        # One that cannot be started is told of where a task needs it.
        with self._guard, contextlib.suppress(OSError):
            while not self._closed and len(self._processes) < self.workers:
                self._idle.append(_Process())
                self._processes.append(self._idle[-1])

    def submit(self, task: Task) -> Future[Answer]:
        """Have a task performed; tasks begin in the order in which they come.

        Returns:
            Its result to be; SlideError, OSError or `DecoderDied` as exceptions.
        """
        return self._threads.submit(self._perform if self.workers else self._perform_here, task)

    def _perform_here(self, task: Task) -> Answer:
        if not hasattr(self._own, "decoder"):
            self._own.decoder = Decoder()
        return self._own.decoder.perform(task)

    def _perform(self, task: Task) -> Answer:
        # One thread for each process: it sends a task, sleeps until the answer is there, and takes the next.
        for attempt in range(_TRIES):
            try:
                return self._process().call(task)
            except DecoderDied:
                self._own.process = None
                if self._closed or attempt == _TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def _process(self) -> _Process:
        process = getattr(self._own, "process", None)
        if process is None:
            with self._guard:
                if self._closed:
                    raise DecoderDied("the decoding processes were closed")
                self._idle = [other for other in self._idle if other.running]
                if not self._idle:
                    self._idle = [_Process()]
                    self._processes = [other for other in self._processes if other.running] + self._idle
                process = self._own.process = self._idle.pop()
        return process

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes that run."""
        return [process.pid for process in self._processes if process.running]

    def close(self) -> None:
        """End all processes, whatever they do."""
        with self._guard:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Process:
    def __init__(self) -> None:
        command = [sys.executable, "-c", _START.format(path=sys.path)]
        # One core for each: what the libraries in it compute on threads of their own has no other.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def call(self, task: Task) -> Answer:
        try:
            _send(self._popen.stdin, task)
            answer = _receive(self._popen.stdout)
        # ValueError: the pipe was closed, as the job ends.
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            # A process on its way out shall tell its own exit code, not that of our signal.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(1)
            self.kill()
            raise DecoderDied(self._obituary()) from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _obituary(self) -> str:
        code = self._popen.returncode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name
                cause = "memory may be short: use fewer --workers" if name == "SIGKILL" else "the slide may be damaged"
                return f"a process that decodes tiles was killed by {name}; {cause}, then --retry-failed"
        return f"a process that decodes tiles ended with exit code {code}; its last words are above"

    def kill(self) -> None:
        if self.running:
            self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def serve() -> None:
    """Perform the tasks that come through standard input, until it ends (the main of a decoding process)."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What a library prints must not get between the answers.
    os.dup2(2, 1)
    # Half a second that the first slide's tissue would wait for; where it is missing or broken, that slide tells.
    with contextlib.suppress(Exception):
        import scipy.ndimage  # noqa: F401
    decoder = Decoder()
    while True:
        try:
            task = _receive(source)
        except EOFError:
            return
        try:
            answer = decoder.perform(task)
        # Whatever it is, who asked shall hear it: this process goes on.
        except Exception as error:
            answer = _portable(error)
        try:
            _send(sink, answer)
        except BrokenPipeError:
            return


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    # An exception of any library may hold what cannot be sent, or be made of other arguments than it keeps.
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {one_line(error)}")
    return error


def _send(pipe: BinaryIO, message: object) -> None:
    # Out of band, pixels go from their array into the pipe without a copy.
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [body, *(buffer.raw() for buffer in buffers)]
    pipe.write(b"".join(len(part).to_bytes(8, "little") for part in parts) + b"\xff" * 8)
    for part in parts:
        pipe.write(part)
    pipe.flush()


def _receive(pipe: BinaryIO) -> object:
    lengths = []
    while (number := _take(pipe, 8)) != b"\xff" * 8:
        lengths.append(int.from_bytes(number, "little"))
    body, *buffers = (_take(pipe, length) for length in lengths)
    return pickle.loads(body, buffers=buffers)


def _take(pipe: BinaryIO, length: int) -> bytearray:
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        count = pipe.readinto(view[got:])
        if not count:
            raise EOFError
        got += count
    return data
