"""The folder of a job over slides: what it is made with, which process writes what, what became of each slide."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ssmamba_models.engine.config import load_config, save_config
from ssmamba_models.locks import JOB_LOCK, STALE, Lock, Locks
from ssmamba_models.wsi.decoding import OutputError
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.status import StatusLog, write_summary

# What whole_file and check_output leave behind where a process is killed.
PART = r"\.{stem}\.[0-9a-f]{{8}}\.part(\.[A-Za-z0-9]+)?"
_PROBE = re.compile(r"\.ssmamba-probe-[0-9a-f]{8}")
_JOB_TIMEOUT = 1.25 * STALE


@dataclass(frozen=True)
class FolderSettings:
    """All that decides what a job's outputs are. One job has one of these; its outputs tell its hash."""

    def values(self) -> dict[str, Any]:
        """As YAML and JSON have them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def hash(self) -> str:
        """64 hexadecimal digits that are the same for the same settings."""
        return hashlib.sha256(json.dumps(self.values(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Saved:
    """config.yaml: the settings, their hash, and how the job was begun."""

    settings: dict
    configuration_hash: str
    begun_with: dict


Settings = TypeVar("Settings", bound=FolderSettings)


class JobFolder(abc.ABC, Generic[Settings]):
    """An open job folder; close it, or use it in a `with` block, to let go of its locks.

    Attributes:
        root: the folder.
        settings: what it is made with.
        status: its events.
        locks: of its slides.
    """

    # What a job makes, for messages, and the stems of the files at its root that processes take turns to write.
    outputs = "outputs"
    shared_files: tuple[str, ...] = ("config", "summary")

    def __init__(self, root: str | os.PathLike, settings: Settings):
        if not os.fspath(root):
            raise ValueError("the job's folder (--out, out=...) is empty; name the folder to write")
        self.root, self.settings = Path(root), settings
        self.status = StatusLog(self.root / "status.jsonl")
        self.locks = Locks(self.root / ".locks")

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that are made when the job begins."""
        return (self.root,)

    @property
    def config(self) -> Path:
        """Where the settings stand."""
        return self.root / "config.yaml"

    def open(self, begun_with: dict[str, Any]) -> JobFolder:
        """Make the folder, or go on in one that was made with the same settings.

        Args:
            begun_with: what else config.yaml shall tell of the job's beginning.

        Raises:
            FileNotFoundError: the folder above is not there.
            FileExistsError, NotADirectoryError: it holds something else than a job, or is a file.
            ValueError: it was made with other settings; each is named.
            OutputError: it cannot be written.
        """
        self.check_place()
        try:
            for folder in self.folders:
                folder.mkdir(parents=folder != self.root, exist_ok=True)
            with self._alone():
                self.check_settings()
                self._clean_folder_files()
                if not self.config.exists():
                    save_config(_Saved(self.settings.values(), self.settings.hash, begun_with), self.config)
        except OSError as error:
            raise error if isinstance(error, OutputError) else OutputError.of(error, self.root) from error
        return self

    def check_place(self) -> None:
        """Make sure that the folder can be made, or is a job with these settings.

        Raises:
            FileNotFoundError, FileExistsError, NotADirectoryError, ValueError: as `open`.
        """
        check_root(self.root)
        if self.config.exists():
            self.check_settings()
        elif self.root.is_dir():
            self._check_contents()

    def _check_contents(self) -> None:
        """Refuse a folder without config.yaml that holds more than a job does that was killed before it was written."""
        if not all(name.startswith(".") or self._is_ours(name) for name in os.listdir(self.root)):
            raise FileExistsError(f"{str(self.root)!r} holds other files than a job's; choose another --out")

    def _is_ours(self, name: str) -> bool:
        """Whether `open` makes this in the folder before config.yaml."""
        return False

    def check_settings(self) -> None:
        """Make sure that the folder, if it is a job, was made with these settings.

        Raises:
            ValueError: it was not; what differs is named.
        """
        if not self.config.exists():
            return
        saved, now = load_config(_Saved, self.config).settings, self.settings.values()
        strange = set(saved) - {field.name for field in dataclasses.fields(self.settings)}
        if strange:
            raise ValueError(
                f"{str(self.root)!r} is a job, but not one that makes {self.outputs} (its config.yaml has "
                f"{', '.join(sorted(strange))}); choose another --out"
            )
        changed = [key for key in {**now, **saved} if saved.get(key) != now.get(key)]
        if changed:
            listed = "; ".join(f"{key} was {_brief(saved.get(key))}, now {_brief(now.get(key))}" for key in changed)
            raise ValueError(
                f"the job {str(self.root)!r} was begun with other settings ({listed}); a job does not mix "
                f"{self.outputs}: give the same settings, or another --out"
            )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the job's other processes from its own files (config.yaml, summary.csv) within the block."""
        lock: Lock | None = None
        before: str | None = None
        while lock is None:
            # Many processes at once take turns, and all turns together may be long: only one long turn is a fault.
            holding = self.locks.holding(JOB_LOCK)
            if holding is not None and holding == before:
                raise OutputError(
                    f"another process has been writing in {str(self.root)!r} for minutes; is its disk stuck?"
                )
            before = holding
            lock = self.locks.acquire(JOB_LOCK, _JOB_TIMEOUT)
        with lock:
            yield

    def _clean_folder_files(self) -> None:
        for name in self.shared_files:
            remove_matching(self.root, re.compile(PART.format(stem=name)))
        for folder in self.folders:
            remove_matching(folder, _PROBE)

    @abc.abstractmethod
    def clean_slide(self, slide: SlideFile) -> None:
        """Remove what a killed process left of a slide; only while its lock is held."""

    def discard_obsolete(self, slide: SlideFile) -> None:
        """Remove what was made of an earlier file of a slide that now ends without output; only while its lock is held.

        By default nothing goes: who reads the tables finds no such slide in them.
        """

    @abc.abstractmethod
    def find_done(self, slide: SlideFile) -> dict[str, Any] | None:
        """What is known of a slide whose output is there, whole, of this job and of this slide.

        Returns:
            Facts for the summary; None where the slide must be done.

        Raises:
            ValueError: it was done at another mpp of level 0 than is now given.
        """

    @staticmethod
    def _check_mpp(slide: SlideFile, path: Path, mpp: float, done: str) -> None:
        if slide.mpp is not None and slide.mpp != mpp:
            raise ValueError(
                f"{str(path)!r} was {done} at {mpp:g} um per level-0 pixel, now {slide.mpp:g} is given; if that is "
                "right remove it, else give the mpp of single slides with --mpp-csv"
            )

    def write_tables(self, slides: list[SlideFile], wait: bool = True) -> None:
        """Bring summary.csv, and what other tables the job has, up to date with all processes' events.

        Args:
            slides: of the job.
            wait: for another process that is at it; else leave it to that one.

        Raises:
            OutputError: it cannot be written.
        """
        if not wait and self.locks.newest(JOB_LOCK) is not None:
            return
        try:
            with self._alone():
                self._write_tables([slide.name for slide in slides])
        except OSError as error:
            raise error if isinstance(error, OutputError) else OutputError.of(error, self.root) from error

    def _write_tables(self, slides: list[str]) -> None:
        write_summary(self.root / "summary.csv", self.status.latest(), slides)

    def close(self) -> None:
        """Release all locks, and remove those that processes left that died between a slide's end and its release."""
        with contextlib.suppress(OSError):  # a full disk
            self.locks.sweep()
        self.locks.close()

    def __enter__(self) -> JobFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_root(out: str | os.PathLike) -> None:
    """Make sure, before a model is loaded, that a job's folder is one or can be made.

    Raises:
        FileNotFoundError: the folder above it is not there.
        NotADirectoryError: it is a file.
    """
    root = Path(out)
    if not root.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(root.parent)!r} does not exist; create it (mkdir -p)")
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"the job's folder {str(root)!r} is a file; choose another --out")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if not re.fullmatch(r"'[0-9a-f]{64}'", text) else f"{text[:13]}...'"


def remove_matching(folder: Path, pattern: re.Pattern) -> None:
    """Remove the files of a folder whose names match."""
    for name in os.listdir(folder):
        if pattern.fullmatch(name):
            (folder / name).unlink(missing_ok=True)
