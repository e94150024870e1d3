"""Locks: one owner at a time, dead owners are followed by exactly one other, living ones by none."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from ssmamba_models.locks import Locks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests make processes by fork")


@pytest.fixture
def locks(tmp_path):
    with Locks(tmp_path / "locks") as locks:
        yield locks


def fork(work):
    """Run `work` in a child; it ends without pytest's own end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def die_with_lock(folder, name):
    Locks(folder).acquire(name)
    os.kill(os.getpid(), signal.SIGKILL)


def age(path, seconds):
    past = time.time() - seconds
    os.utime(path, (past, past))


def as_from_elsewhere(lock):
    """Let a lock say that another machine's process made it."""
    said = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps({**said, "machine": "elsewhere"}))


def test_one_owner_at_a_time(locks):
    other = Locks(locks.folder)
    with locks.acquire("a") as lock:
        assert lock.held
        assert other.acquire("a") is None
        assert other.acquire("b") is not None
    assert not lock.held
    assert other.acquire("a") is not None
    other.close()


def test_names_that_look_alike_are_different_locks(locks):
    assert all(locks.acquire(name) for name in ("a", "a.0", "a.0.lock", "a b", "ä"))


def test_waiting_for_a_release(locks):
    def hold_for_a_moment():
        with Locks(locks.folder).acquire("a"):
            time.sleep(0.5)

    pid = fork(hold_for_a_moment)
    while locks.newest("a") is None:
        time.sleep(0.01)
    assert locks.acquire("a", timeout=0.05) is None
    assert locks.acquire("a", timeout=10) is not None
    os.waitpid(pid, 0)


def test_the_lock_of_a_killed_process_is_taken_over(locks):
    pid = fork(lambda: die_with_lock(locks.folder, "a"))
    # Not reaped yet, as where its parent is busy: a zombie holds nothing.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert locks.newest("a") is not None
    lock = locks.acquire("a")
    assert lock.held
    os.waitpid(pid, 0)
    lock.release()
    assert locks.newest("a") is None


def test_a_process_with_a_reused_number_is_not_the_owner(locks):
    lock = locks.acquire("a")
    said = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps({**said, "started": "1"}))
    assert Locks(locks.folder).acquire("a") is not None


def test_another_machine_counts_as_dead_without_a_heartbeat_only(locks):
    lock = locks.acquire("a")
    as_from_elsewhere(lock)
    assert Locks(locks.folder).acquire("a") is None
    age(lock.path, 100)
    assert Locks(locks.folder).acquire("a") is None
    age(lock.path, 130)
    second = Locks(locks.folder).acquire("a")
    assert second.held
    assert not lock.held
    lock.release()  # by an owner that woke up: it must not take the new one's
    assert second.held


def answer_instead(monkeypatch, file, answer):
    """Let a file of the system say something else, or refuse to."""
    real = Path.read_text

    def read_text(path, *args, **kwargs):
        if str(path) != file:
            return real(path, *args, **kwargs)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
@pytest.mark.parametrize("error", [PermissionError(), FileNotFoundError()], ids=["hidepid=1", "hidepid=2"])
def test_a_living_process_whose_state_is_hidden_is_judged_by_its_heartbeat(locks, monkeypatch, error):
    pid = fork(lambda: (Locks(locks.folder).acquire("a"), time.sleep(60)))
    try:
        while locks.newest("a") is None or not locks.newest("a")[1].read_text():
            time.sleep(0.01)
        assert locks.owner("a") == (f"process {pid}", True)
        answer_instead(monkeypatch, f"/proc/{pid}/stat", error)
        assert locks.acquire("a") is None
        assert locks.owner("a") == (f"process {pid}", False)
        age(locks.newest("a")[1], 130)
        assert locks.acquire("a").held
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.skipif(not os.path.exists("/proc/sys/kernel/random/boot_id"), reason="needs /proc")
def test_machines_of_one_name_are_told_apart(locks, monkeypatch):
    lock = locks.acquire("a")
    said = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps({**said, "pid": 2**22 + 1}))  # no process of this machine
    answer_instead(monkeypatch, "/proc/sys/kernel/random/boot_id", "another machine\n")
    assert Locks(locks.folder).acquire("a") is None
    monkeypatch.undo()
    assert Locks(locks.folder).acquire("a") is not None


def test_an_owner_elsewhere_is_waited_for_until_it_gives_a_sign_of_life_or_must_be_dead(tmp_path):
    with Locks(tmp_path / "locks", beat=0.2, stale=1.0) as locks, Locks(locks.folder, beat=1000) as silent:
        as_from_elsewhere(lock := silent.acquire("a"))
        start = time.monotonic()
        assert locks.await_owners(["a"])
        assert time.monotonic() - start < 2
        assert locks.acquire("a") is not None
        with Locks(locks.folder, beat=0.05) as living:
            as_from_elsewhere(living.acquire("b"))
            start = time.monotonic()
            assert not locks.await_owners(["b"])
            assert time.monotonic() - start < 1
        assert locks.await_owners(["b"])  # it let go
        lock.release()


def test_the_heart_beats(tmp_path):
    with Locks(tmp_path / "locks", beat=0.05) as locks:
        lock = locks.acquire("a")
        age(lock.path, 1000)
        deadline = time.monotonic() + 10
        while time.time() - lock.path.stat().st_mtime > 100 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert time.time() - lock.path.stat().st_mtime < 100


def test_an_empty_file_is_a_process_that_died_between_making_and_writing(locks):
    locks.folder.mkdir()
    path = locks.folder / "a.0.lock"
    path.touch()
    age(path, 10)
    assert locks.acquire("a").held
    (locks.folder / "b.0.lock").touch()
    start = time.monotonic()
    assert locks.acquire("b").held
    assert time.monotonic() - start > 0.5  # its maker was given time to write


def test_a_sweep_removes_what_dead_processes_left_and_nothing_else(locks):
    os.waitpid(fork(lambda: die_with_lock(locks.folder, "dead")), 0)
    other = Locks(locks.folder)
    living = other.acquire("living")
    locks.sweep()
    assert locks.newest("dead") is None
    assert living.held
    other.close()


def test_closing_releases_and_removes_the_folder(tmp_path):
    locks = Locks(tmp_path / "locks")
    locks.acquire("a"), locks.acquire("b")
    locks.close()
    assert not (tmp_path / "locks").exists()


def test_of_many_takers_one_wins(locks):
    """Eight times three processes fall upon one dead owner at once."""
    for round_ in range(8):
        name = f"slide{round_}"
        os.waitpid(fork(lambda name=name: die_with_lock(locks.folder, name)), 0)
        start, go = os.pipe()
        told, tell = os.pipe()

        def take(name=name, start=start, go=go, tell=tell):
            os.close(go)
            os.read(start, 1)  # ends for all when the parent closes its end
            won = Locks(locks.folder).acquire(name) is not None
            os.write(tell, b"1" if won else b"0")
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)

        pids = [fork(take) for _ in range(3)]
        os.close(start), os.close(go), os.close(tell)
        answers = b""
        while chunk := os.read(told, 8):
            answers += chunk
        os.close(told)
        for pid in pids:
            os.waitpid(pid, 0)
        assert sorted(answers) == sorted(b"001")


def test_what_a_lock_guards_is_never_done_by_two(locks, tmp_path):
    """Four processes count in one file; some die with the lock in their hands."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count(number):
        mine = Locks(locks.folder)
        for step in range(15):
            with mine.acquire("counter", timeout=30):
                value = int(counter.read_text())
                time.sleep(0.001)
                counter.write_text(str(value + 1))
                if number == 0 and step == 7:
                    os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)

    pids = [fork(lambda number=number: count(number)) for number in range(4)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert codes == [signal.SIGKILL, 0, 0, 0]
    assert int(counter.read_text()) == 3 * 15 + 8
