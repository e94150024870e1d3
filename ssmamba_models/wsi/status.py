"""What happened to the slides of a job: events, one line each in status.jsonl, and the table that follows from them."""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmamba_models.output import whole_file

if TYPE_CHECKING:
    from ssmamba_models.wsi.slide_list import SlideFile

DONE, NO_TISSUE, FAILED, STARTED, PENDING = "done", "no tissue", "failed", "started", "pending"
# Never in the log: another process has the slide, and tells of it.
ELSEWHERE = "elsewhere"

COLUMNS = (
    "slide",
    "status",
    "tiles",
    "tissue_share",
    "mpp",
    "mpp_source",
    "mpp_error",
    "bad_tiles",
    "seconds",
    "reason",
)


class StatusLog:
    """The events of a job, which all its processes append to.

    Args:
        path: status.jsonl; made at the first event.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._read_to = 0
        self._latest: dict[str, dict[str, Any]] = {}

    def write(self, status: str, slide: str, **facts: Any) -> None:
        """Append an event, in one write, so that lines of several processes do not mix.

        Args:
            status: DONE, NO_TISSUE, FAILED or STARTED.
            slide: the slide's name.
            facts: more of what is known, for `COLUMNS`; lists and mappings for the log only.

        Raises:
            OSError: the log cannot be written.
        """
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        event = {"time": now, "slide": slide, "status": status, **facts, "pid": os.getpid()}
        line = json.dumps(event, ensure_ascii=False) + "\n"
        handle = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o666)
        try:
            with _locked(handle):
                os.write(handle, (self._line_break(handle) + line).encode("utf-8", "backslashreplace"))
        finally:
            os.close(handle)

    @staticmethod
    def _line_break(handle: int) -> str:
        # A process that died, or a disk that was full, may have left half a line.
        if not os.fstat(handle).st_size:
            return ""
        os.lseek(handle, -1, os.SEEK_END)
        return "\n" if os.read(handle, 1) != b"\n" else ""

    def latest(self) -> dict[str, dict[str, Any]]:
        """The newest event of each slide, what other processes wrote included; slide -> event."""
        for event in self._new_events():
            self._latest[event["slide"]] = event
        return self._latest

    def _new_events(self) -> Iterable[dict[str, Any]]:
        try:
            with open(self.path, "rb") as file:
                file.seek(self._read_to)
                data = file.read()
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        self._read_to += end
        for line in data[:end].splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict) and all(isinstance(event.get(key), str) for key in ("slide", "status")):
                    yield event


def is_settled(event: Mapping[str, Any], slide: SlideFile, retry_failed: bool) -> bool:
    """Whether a slide that has no output is left as it is.

    Args:
        event: its newest; empty where there is none.
        slide: as it is now.
        retry_failed: try failed slides again.
    """
    if event.get("bytes") != slide.bytes:
        return False
    if event.get("status") == FAILED:
        # Whoever gives another mpp than when it failed has read why.
        return not retry_failed and slide.mpp == event.get("given_mpp")
    # What is tissue depends on the mpp: small things are dirt.
    return event.get("status") == NO_TISSUE and (slide.mpp is None or slide.mpp == event.get("mpp"))


@contextlib.contextmanager
def _locked(handle: int) -> Iterator[None]:
    # Over NFS only a lock makes an append go to the end that other machines see. Where there are no locks, one write
    # of a line is still atomic on a local disk.
    try:
        import fcntl
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)


def write_summary(path: str | os.PathLike, latest: Mapping[str, Mapping[str, Any]], slides: Iterable[str]) -> None:
    """Write the table of slides, one row each, whole or not at all.

    Args:
        path: summary.csv.
        latest: what `StatusLog.latest` gave.
        slides: names of the job's slides; those that are not in `latest` wait.

    Raises:
        OSError: it cannot be written.
    """
    names = sorted({*slides, *latest})
    with whole_file(path, overwrite=True) as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        table.writeheader()
        for name in names:
            table.writerow({"slide": name, "status": PENDING, **_cells(latest.get(name, {}))})


def _cells(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in event.items()}


def read_summary(path: str | os.PathLike) -> dict[str, dict[str, str]]:
    """Read summary.csv: slide -> {column: text}."""
    with open(path, newline="", encoding="utf-8") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}
