"""Locks between processes and machines that share a folder: files made with O_CREAT|O_EXCL that carry a heartbeat.

A lock has generations: `NAME.0.lock`, and where its owner died `NAME.1.lock`, and so on; the highest one owns. Taking
over means making the next generation, which only one process can do, so two takers never both win; one that judged an
owner dead long ago notices that this owner's file is gone, and starts again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

# Seconds between heartbeats, and after how many without one the owner on another machine counts as dead: long enough
# for a file server to restart.
BEAT, STALE = 10.0, 120.0
# The job's own lock, beside those of its slides.
JOB_LOCK = "-job-"

# An owner writes its name at once; a file that stays empty this long was made by a process that died in between.
_EMPTY, _EMPTY_POLL = 2.0, 0.05
_ATTEMPTS = 20
_FILE = re.compile(r"(?s)(?P<name>.*)\.(?P<generation>\d+)\.lock")


@dataclass
class Lock:
    """A lock that this process holds.

    Attributes:
        name: what is locked.
        path: its file.
        text: what the file says of its owner.
    """

    name: str
    path: Path
    text: str
    _locks: Locks = field(repr=False)

    @property
    def held(self) -> bool:
        """Whether it is still ours: not where we slept so long that another process had to think us dead."""
        newest = self._locks.newest(self.name)
        return newest is not None and newest[1] == self.path and _read(self.path) == self.text

    def release(self) -> None:
        """Let others have it; a second call does nothing."""
        self._locks.forget(self)
        if _read(self.path) == self.text:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Locks:
    """The locks of a folder; close it, or use it in a `with` block, to release all that this process holds.

    Args:
        folder: where the files lie; made where it is missing.
        beat: seconds between heartbeats.
        stale: seconds without one after which an owner on another machine is dead. On this machine its process tells,
            where the system lets us see it.
    """

    def __init__(self, folder: str | os.PathLike, beat: float = BEAT, stale: float = STALE):
        self.folder = Path(folder)
        self._beat, self._stale = beat, stale
        self._held: list[Lock] = []
        self._guard = threading.Lock()
        self._stopped = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self, name: str, timeout: float = 0.0) -> Lock | None:
        """Take a lock, over from a dead owner too.

        Args:
            name: what to lock.
            timeout: seconds to wait for a living owner.

        Returns:
            The lock, or None where a living process holds it.

        Raises:
            OSError: the folder cannot be written.
        """
        deadline = time.monotonic() + timeout
        while True:
            lock = self._acquire(name)
            if lock is not None or time.monotonic() >= deadline:
                return lock
            time.sleep(min(0.2, timeout))

    def _acquire(self, name: str) -> Lock | None:
        for _ in range(_ATTEMPTS):
            newest = self.newest(name)
            owner = None if newest is None else _read(newest[1])
            if newest is not None and owner is None:
                continue  # released since we looked
            if newest is not None and owner == "":
                self._await_owner(newest[1])
                owner = _read(newest[1])
            if newest is not None and (owner is None or not self._is_dead(newest[1], owner)):
                return None
            lock = self._create(name, newest, owner)
            if lock is not None:
                self._hold(lock)
                return lock
            time.sleep(random.uniform(0, 0.02))
        return None

    def _await_owner(self, path: Path) -> None:
        """Sleep until a file says whose it is, or must be a dead process's."""
        deadline = time.monotonic() + _EMPTY
        while _read(path) == "" and self._age(path) <= _EMPTY and time.monotonic() < deadline:
            time.sleep(_EMPTY_POLL)

    def _create(self, name: str, before: tuple[int, Path] | None, owner: str | None) -> Lock | None:
        """Make the next generation; None where another process was faster, or the dead owner's file is not there."""
        generation = 0 if before is None else before[0] + 1
        path = self.folder / f"{name}.{generation}.lock"
        text = json.dumps({**_this_process(), "time": time.time(), "token": secrets.token_hex(8)})
        self.folder.mkdir(exist_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except (FileExistsError, FileNotFoundError):
            return None
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)
        lock = Lock(name, path, text, self)
        if not lock.held or (before is not None and _read(before[1]) != owner):
            path.unlink(missing_ok=True)
            return None
        if before is not None:
            self._remove_older(name, generation)
        return lock

    def holding(self, name: str) -> str | None:
        """What tells one holding of a lock from the next, of the same owner too; None where it is free."""
        newest = self.newest(name)
        return None if newest is None else _read(newest[1])

    def owner(self, name: str) -> tuple[str, bool]:
        """Who holds a lock, in words, and whether it lives for certain: it is of this machine, and runs."""
        try:
            said = json.loads(self.holding(name) or "{}")
        except ValueError:
            said = {}
        machine, number = said.get("machine"), said.get("pid")
        if machine == _machine():
            return f"process {number}", bool(_lives(said))
        return (f"process {number} on {str(machine).split()[0]}" if machine else "another process"), False

    @property
    def patience(self) -> float:
        """Seconds without a sign of life after which an owner that we cannot see is dead for certain."""
        return self._stale + 2 * self._beat

    def await_owners(self, names: Iterable[str]) -> bool:
        """Wait for owners of whom we cannot see whether they live; at most for `patience`.

        Args:
            names: what they hold.

        Returns:
            Whether one of the locks can be had now; False once each owner has given a sign of life.
        """
        files = [self.newest(name) for name in names]
        if None in files:
            return True
        silent = {file[1]: _beaten(file[1]) for file in files if file is not None}
        deadline = time.monotonic() + self.patience
        while silent and time.monotonic() < deadline:
            time.sleep(self._beat / 10)
            for path, beaten in list(silent.items()):
                owner = _read(path)
                if owner is None or self._is_dead(path, owner):
                    return True
                if _beaten(path) != beaten:
                    del silent[path]
        return False

    def newest(self, name: str) -> tuple[int, Path] | None:
        """The highest generation of a lock and its file; None where it is free."""
        return max(self._generations(name), default=None)

    def _generations(self, name: str) -> list[tuple[int, Path]]:
        try:
            files = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        matches = [match for match in map(_FILE.fullmatch, files) if match and match["name"] == name]
        return [(int(match["generation"]), self.folder / match.string) for match in matches]

    def _remove_older(self, name: str, generation: int) -> None:
        for number, path in self._generations(name):
            if number < generation:
                path.unlink(missing_ok=True)

    def _is_dead(self, path: Path, owner: str) -> bool:
        try:
            said = json.loads(owner)
        except ValueError:
            return self._age(path) > _EMPTY
        lives = _lives(said)
        return self._age(path) > self._stale if lives is None else not lives

    def _age(self, path: Path) -> float:
        """Seconds since a file's last heartbeat, by the file server's clock: those of two machines may differ."""
        try:
            os.utime(self.folder)
            return self.folder.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _hold(self, lock: Lock) -> None:
        with self._guard:
            self._held.append(lock)
            if self._heart is None:
                self._heart = threading.Thread(target=self._keep_beating, name="lock heartbeat", daemon=True)
                self._heart.start()

    def forget(self, lock: Lock) -> None:
        """No heartbeat for a lock any more."""
        with self._guard, contextlib.suppress(ValueError):
            self._held.remove(lock)

    def _keep_beating(self) -> None:
        while not self._stopped.wait(self._beat):
            with self._guard:
                for lock in self._held:
                    # A lock that was lost has no file; its owner finds out by `held`.
                    with contextlib.suppress(OSError):
                        os.utime(lock.path)

    def sweep(self) -> None:
        """Remove the locks of dead processes."""
        try:
            files = os.listdir(self.folder)
        except FileNotFoundError:
            return
        for name in {match["name"] for match in map(_FILE.fullmatch, files) if match}:
            lock = self.acquire(name)
            if lock is not None:
                lock.release()

    def close(self) -> None:
        """Release all locks that this process holds, and remove the folder if that leaves it empty."""
        self._stopped.set()
        for lock in list(self._held):
            lock.release()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def __enter__(self) -> Locks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _beaten(path: Path) -> int | None:
    """When a file's last heartbeat was; None where it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _this_process() -> dict[str, str | int | None]:
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _machine() -> str:
    # Containers may share a host name, and so may machines ("localhost"); a process number means something in its own
    # namespace only, on a machine that has not been started again.
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/pid"))
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    return " ".join(facts)


def _lives(said: Mapping[str, Any]) -> bool | None:
    """Whether a lock's owner runs; None where only its heartbeat can tell: on another machine, or hidden from us."""
    if said.get("machine") != _machine() or os.name != "posix":
        return None
    started = _started(said["pid"])
    return None if started is None else started == said["started"]


def _started(pid: int) -> str | None:
    """When a process of this machine began, in the system's words.

    "" where it does not run (zombies do not), None where it runs and the system hides when it began.
    """
    try:
        # The second field is the command's name in brackets, which may hold blanks and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        pass  # there is no /proc, no such process, or it is another user's and /proc is mounted with hidepid
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return None if os.path.exists("/proc/self/stat") else "running"
