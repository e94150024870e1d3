"""The folder of a job of cutting tiles: a folder of images for each slide, and a manifest of them all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmamba_models.choices import TILE_SUFFIXES
from ssmamba_models.data.labelled import MANIFEST
from ssmamba_models.notice import SSMambaWarning
from ssmamba_models.output import whole_file
from ssmamba_models.wsi.decoding import OutputError
from ssmamba_models.wsi.job_folder import FolderSettings, JobFolder
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.status import DONE, STARTED
from ssmamba_models.wsi.tile_manifest import read_tile_labels, write_manifest

# Raised when the same settings begin to give other tiles.
FORMAT = 1

# In each slide's folder: where it comes from, its geometry, and its tiles.
RECORD = "slide.json"
LABELS = "labels.csv"
_RESERVED = {MANIFEST, LABELS, "summary.csv", "config.yaml", "status.jsonl"}
_HIDDEN = r"\.{name}\.[0-9a-f]{{8}}\.tiles"


@dataclass(frozen=True)
class TileSettings(FolderSettings):
    """All that decides what a job's tiles are. One job has one of these; its slides' records tell its hash.

    Attributes:
        mpp, tile_size, overlap, min_tissue: the tiles, as `wsi.grid.make_grid`.
        image_format: "png" or "jpeg".
        quality: of JPEG; None for PNG.
        format: `FORMAT`.
    """

    mpp: float
    tile_size: int
    overlap: int
    min_tissue: float
    image_format: str
    quality: int | None
    format: int = FORMAT


class TileJob(JobFolder[TileSettings]):
    """An open job of cutting tiles (see `JobFolder`)."""

    outputs = "tiles"
    shared_files = ("config", "summary", "manifest", "labels")
    _warned = False

    @property
    def manifest(self) -> Path:
        """Where the tiles of all finished slides are listed."""
        return self.root / MANIFEST

    def slide_folder(self, name: str) -> Path:
        """Where a slide's tiles go."""
        return self.root / name

    def hidden_folder(self, name: str) -> Path:
        """A new place for a slide's tiles before they are whole, or when they are obsolete."""
        return self.root / f".{name}.{secrets.token_hex(4)}.tiles"

    def tile_name(self, x: int, y: int) -> str:
        """What the tile in this column and row of its slide's grid is called."""
        return f"{x}_{y}{TILE_SUFFIXES[self.settings.image_format]}"

    def clean_slide(self, slide: SlideFile) -> None:
        """As `JobFolder.clean_slide`: folders that were not finished, or are obsolete."""
        pattern = re.compile(_HIDDEN.format(name=re.escape(slide.name)))
        for name in os.listdir(self.root):
            if pattern.fullmatch(name):
                shutil.rmtree(self.root / name, ignore_errors=True)

    def find_done(self, slide: SlideFile) -> dict[str, Any] | None:
        """As `JobFolder.find_done`: all tiles that its record lists are there, and are of this job and this slide."""
        record = self._record(slide.name)
        if record is None or record["slide_bytes"] != slide.bytes:
            return None
        self._check_mpp(slide, self.slide_folder(slide.name), record["level0_mpp"], "cut")
        tiles = len(record["tiles"])
        facts = {key: record[key] for key in ("tissue_share", "mpp_source", "mpp_error")}
        return {"tiles": tiles, "mpp": record["level0_mpp"], **facts, "bad_tiles": record["tiles_in_grid"] - tiles}

    def _record(self, name: str) -> dict[str, Any] | None:
        """What is known of a slide's tiles; None where they are not all there, or are another job's."""
        folder = self.slide_folder(name)
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            there = set(os.listdir(folder))
            if record["configuration_hash"] != self.settings.hash:
                return None
            whole = all(self.tile_name(x, y) in there for x, y, *_ in record["tiles"])
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return record if whole else None

    def holds_others_files(self, name: str) -> bool:
        """Whether something else than a job's tiles lies where a slide's shall go."""
        folder = self.slide_folder(name)
        return folder.exists() and not (folder / RECORD).is_file() and (not folder.is_dir() or any(folder.iterdir()))

    def check_labels(self, slides: Collection[str], table: str | os.PathLike | None) -> None:
        """Make sure that a table has the labels of these slides and of those that anyone has finished or begun.

        Args:
            slides: names.
            table: CSV; None takes what an earlier process of this job was given, if that was one.

        Raises:
            OSError, ValueError: as `read_tile_labels`.
        """
        table = self._kept_labels if table is None else table
        if table is not None:
            latest = self.status.latest()
            begun = {name for name, event in latest.items() if event["status"] == STARTED}
            read_tile_labels(table, {*slides, *self._finished(), *begun}, latest)

    @property
    def _kept_labels(self) -> Path | None:
        path = self.root / LABELS
        return path if path.exists() else None

    def keep_labels(self, table: str | os.PathLike) -> None:
        """Have all manifests of this job filled from a table, those that other processes write too.

        Raises:
            OutputError: it cannot be copied.
        """
        try:
            data = Path(table).read_bytes()
            with self._alone(), whole_file(self.root / LABELS, overwrite=True) as part:
                part.write_bytes(data)
        except OSError as error:
            raise error if isinstance(error, OutputError) else OutputError.of(error, self.root / LABELS) from error

    def _finished(self) -> dict[str, dict[str, Any]]:
        """Name -> record of the slides whose tiles are whole, those of other processes too."""
        done = (name for name, event in self.status.latest().items() if event["status"] == DONE)
        return {name: record for name in sorted(done) if (record := self._record(name)) is not None}

    def _write_tables(self, slides: list[str]) -> None:
        super()._write_tables(slides)
        tiles = {
            name: [(f"{name}/{self.tile_name(x, y)}", x, y) for x, y, *_ in record["tiles"]]
            for name, record in self._finished().items()
        }
        table = self._kept_labels
        try:
            labels = None if table is None else read_tile_labels(table, set(tiles), {*slides, *self.status.latest()})
        except ValueError as error:
            # Another process gave the job labels that lack what this one has finished since: no reason to stop.
            if not self._warned:
                said = f"{str(self.manifest)!r} stays as it was: {error}; then run the job again with --labels"
                warnings.warn(said, SSMambaWarning, stacklevel=2)
            self._warned = True
            return
        write_manifest(self.manifest, tiles, labels)


def check_slide_names(slides: Collection[SlideFile]) -> None:
    """Make sure that slides can be folders beside a job's own files, and entries of a table.

    Raises:
        ValueError: one cannot.
    """
    for slide in slides:
        if slide.name in _RESERVED or slide.name.startswith(".") or slide.name != slide.name.strip():
            raise ValueError(
                f"the slide {slide.path!r} would give its tiles a folder {slide.name!r}, which is hidden, a file of "
                "the job, or begins or ends with a space; rename it"
            )
