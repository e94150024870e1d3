"""The folder of a job: where everything lies, what its features are made with, and which slides are done."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmamba_models.data.features import open_slide_features
from ssmamba_models.engine.config import load_config, save_config
from ssmamba_models.wsi.decoding import OutputError
from ssmamba_models.wsi.locks import STALE, Locks
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.status import StatusLog, write_summary

# Raised when the same settings begin to give other features.
FORMAT = 1

# What whole_file and check_output leave behind where a process is killed.
_PART = r"\.{stem}\.[0-9a-f]{{8}}\.part(\.[A-Za-z0-9]+)?"
_PROBE = re.compile(r"\.ssmamba-probe-[0-9a-f]{8}")
_OURS = re.compile(r"thumbnails|contours|[0-9.e+-]+mpp_\d+px_\d+px")
_JOB_LOCK, _JOB_TIMEOUT = "-job-", 1.25 * STALE


@dataclass(frozen=True)
class JobSettings:
    """All that decides what a job's features are. One job has one of these; its files tell its hash.

    Attributes:
        model, weights_sha256, embed_dim: the encoder.
        input_size, mean, std, interpolation, precision: how it is given a tile, and computes.
        mpp, tile_size, overlap, min_tissue: the tiles, as `wsi.grid.make_grid`.
        dtype: of the stored features.
        grid: whether token maps are stored.
        shared_aug, shared_aug_tiles, shared_aug_seed: bags of shared augmentation per slide, tiles of each, seed of
            both; 0 for none.
        format: `FORMAT`.
    """

    model: str
    weights_sha256: str
    embed_dim: int
    input_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    precision: str
    mpp: float
    tile_size: int
    overlap: int
    min_tissue: float
    dtype: str
    grid: bool
    shared_aug: int = 0
    shared_aug_tiles: int = 0
    shared_aug_seed: int = 0
    format: int = FORMAT

    def values(self) -> dict[str, Any]:
        """As YAML and JSON have them; without bags nothing of bags, so that jobs from before there were any go on."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {key: value for key, value in values.items() if self.shared_aug or not key.startswith("shared_aug")}

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


class Job:
    """An open job folder; close it, or use it in a `with` block, to let go of its locks.

    Attributes:
        root: the folder.
        settings: what it is made with.
        thumbnails, contours, features: folders of outputs.
        status: its events.
        locks: of its slides.
    """

    def __init__(self, root: str | os.PathLike, settings: JobSettings):
        if not os.fspath(root):
            raise ValueError("the job's folder (--out, out=...) is empty; name the folder to write")
        self.root, self.settings = Path(root), settings
        self.thumbnails, self.contours = self.root / "thumbnails", self.root / "contours"
        tiles = f"{settings.mpp:g}mpp_{settings.tile_size}px_{settings.overlap}px"
        self.features = self.root / tiles / f"features_{_folder_name(settings.model)}"
        self.status = StatusLog(self.root / "status.jsonl")
        self.locks = Locks(self.root / ".locks")

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that files are written in."""
        return self.root, self.thumbnails, self.contours, self.features

    def feature_file(self, slide: SlideFile) -> Path:
        """Where a slide's features go."""
        return self.features / f"{slide.name}.h5"

    def open(self, begun_with: dict[str, Any]) -> Job:
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
                if not self._config.exists():
                    self._save_config(begun_with)
        except OSError as error:
            raise error if isinstance(error, OutputError) else OutputError.of(error, self.root) from error
        return self

    @property
    def _config(self) -> Path:
        return self.root / "config.yaml"

    def check_place(self) -> None:
        """Make sure that the folder can be made, or is a job with these settings.

        Raises:
            FileNotFoundError, FileExistsError, NotADirectoryError, ValueError: as `open`.
        """
        if not self.root.parent.is_dir():
            raise FileNotFoundError(f"the folder {str(self.root.parent)!r} does not exist; create it (mkdir -p)")
        if self.root.exists() and not self.root.is_dir():
            raise NotADirectoryError(f"the job's folder {str(self.root)!r} is a file; choose another --out")
        if self._config.exists():
            self.check_settings()
        elif self.root.is_dir() and any(self.features.parent.glob("*/*.h5")):
            raise FileExistsError(f"{str(self.root)!r} holds feature files, but no config.yaml; choose another --out")
        elif self.root.is_dir() and not self._is_ours():
            raise FileExistsError(f"{str(self.root)!r} holds other files than a job's; choose another --out")

    def _is_ours(self) -> bool:
        """Whether the folder holds no more than a job does that was killed before its config.yaml was written."""
        return all(name.startswith(".") or _OURS.fullmatch(name) for name in os.listdir(self.root))

    def check_settings(self) -> None:
        """Make sure that the folder, if it is a job, was made with these settings.

        Raises:
            ValueError: it was not; what differs is named.
        """
        if not self._config.exists():
            return
        saved, now = load_config(_Saved, self._config).settings, self.settings.values()
        changed = [key for key in {**now, **saved} if saved.get(key) != now.get(key)]
        if changed:
            listed = "; ".join(f"{key} was {saved.get(key)!r}, now {now.get(key)!r}" for key in changed)
            raise ValueError(
                f"the job {str(self.root)!r} was begun with other settings ({listed}); a job does not mix features: "
                "give the same settings, or another --out"
            )

    def _save_config(self, begun_with: dict[str, Any]) -> None:
        save_config(_Saved(self.settings.values(), self.settings.hash, begun_with), self._config)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the job's other processes from its own files (config.yaml, summary.csv) within the block."""
        lock = self.locks.acquire(_JOB_LOCK, _JOB_TIMEOUT)
        if lock is None:
            raise OutputError(f"another process has been writing in {str(self.root)!r} for minutes; is its disk stuck?")
        with lock:
            yield

    def _clean_folder_files(self) -> None:
        for name in ("config", "summary"):
            self._remove(self.root, re.compile(_PART.format(stem=name)))
        for folder in self.folders:
            self._remove(folder, _PROBE)

    def clean_slide(self, slide: SlideFile) -> None:
        """Remove what a killed process left of a slide; only while its lock is held."""
        part = re.compile(_PART.format(stem=re.escape(slide.name)))
        for folder in (self.thumbnails, self.contours, self.features):
            self._remove(folder, part)

    @staticmethod
    def _remove(folder: Path, pattern: re.Pattern) -> None:
        for name in os.listdir(folder):
            if pattern.fullmatch(name):
                (folder / name).unlink(missing_ok=True)

    def find_done(self, slide: SlideFile) -> dict[str, Any] | None:
        """What is known of a slide whose features are there: the file opens, and is of this job and of this slide.

        Returns:
            Facts for the summary; None where the slide must be extracted.

        Raises:
            ValueError: it was extracted at another mpp of level 0 than is now given.
        """
        path = self.feature_file(slide)
        if not path.exists():
            return None
        try:
            with open_slide_features(path) as file:
                attributes, geometry, tiles = file.attributes, file.coords_attributes, len(file)
        except (ValueError, OSError):
            return None
        if attributes.get("configuration_hash") != self.settings.hash or attributes["slide_bytes"] != slide.bytes:
            return None
        if slide.mpp is not None and slide.mpp != geometry["level0_mpp"]:
            raise ValueError(
                f"{str(path)!r} was extracted at {geometry['level0_mpp']:g} um per level-0 pixel, now {slide.mpp:g} is "
                "given; if that is right remove the file, else give the mpp of single slides with --mpp-csv"
            )
        facts = {key: attributes[key] for key in ("tissue_share", "mpp_source", "mpp_error")}
        return {
            "tiles": tiles,
            "mpp": geometry["level0_mpp"],
            **facts,
            "bad_tiles": attributes["tiles_in_grid"] - tiles,
        }

    def write_summary(self, slides: list[SlideFile], wait: bool = True) -> None:
        """Bring summary.csv up to date with all processes' events.

        Args:
            slides: of the job.
            wait: for another process that is at it; else leave it to that one.

        Raises:
            OutputError: it cannot be written.
        """
        if not wait and self.locks.newest(_JOB_LOCK) is not None:
            return
        try:
            with self._alone():
                write_summary(self.root / "summary.csv", self.status.latest(), [slide.name for slide in slides])
        except OSError as error:
            raise error if isinstance(error, OutputError) else OutputError.of(error, self.root) from error

    def close(self) -> None:
        """Release all locks, and remove those that processes left that died between a slide's end and its release."""
        with contextlib.suppress(OSError):  # a full disk
            self.locks.sweep()
        self.locks.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _folder_name(model: str) -> str:
    # "hf-hub:ORG/NAME" is a model, and no name of a folder.
    return re.sub(r"[^A-Za-z0-9._-]+", "_", model)
