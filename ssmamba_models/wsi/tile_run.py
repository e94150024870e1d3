"""One slide on its way to a folder of tiles, which appears when all of them are there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ssmamba_models._version import __version__
from ssmamba_models.locks import Lock
from ssmamba_models.wsi.decoding import Cuts, OutputError, Prepared
from ssmamba_models.wsi.held_slide import HeldSlide
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.tile_job import RECORD, TileJob


class TileRun(HeldSlide):
    """A slide whose lock we hold, and whose tiles are written.

    Args:
        job, slide, lock, max_bad_tiles: as `HeldSlide`.
    """

    def __init__(self, job: TileJob, slide: SlideFile, lock: Lock, max_bad_tiles: float):
        super().__init__(job, slide, lock, max_bad_tiles)
        self._folder: Path | None = None
        self._tiles: list[list[int]] = []

    def begin(self, prepared: Prepared) -> None:
        """As `HeldSlide.begin`; a slide whose place is taken ends here."""
        super().begin(prepared)
        if self.outcome is None and self._job.holds_others_files(self.slide.name):
            place = str(self._job.slide_folder(self.slide.name))
            self.fail(f"{place!r}, where its tiles belong, holds something else; move it away, or choose another --out")

    def chunks(self, size: int) -> Iterator[slice]:
        """Its tiles, some at a time."""
        for start in range(0, len(self.coords), size):
            yield slice(start, min(start + size, len(self.coords)))

    def take(self, rows: slice, cuts: Cuts) -> None:
        """Write some tiles. They come in their order.

        Raises:
            OutputError: they cannot be written.
        """
        self._count_bad([(rows.start + place, reason) for place, reason in cuts.bad], rows.stop)
        if self.outcome is not None:
            return
        try:
            self._write(rows, cuts.images)
        except OSError as error:
            self._stop(error)
        if rows.stop == len(self.coords):
            self._finish()

    def _write(self, rows: slice, images: list[bytes | None]) -> None:
        if self._folder is None:
            self._folder = self._job.hidden_folder(self.slide.name)
            self._folder.mkdir()
        places = np.concatenate([self._prepared.cells[rows], self.coords[rows]], axis=1).tolist()
        for place, image in zip(places, images):
            if image is not None:
                (self._folder / self._job.tile_name(*place[:2])).write_bytes(image)
                self._tiles.append(place)

    def _put_in_place(self) -> None:
        if not self._tiles:
            raise ValueError(f"none of its {len(self.coords)} tiles can be read; copy or export the slide again")
        record = {
            **self._geometry(),
            **self._origin(),
            "ssmamba_models_version": __version__,
            "tile_columns": ["x", "y", "level0_x", "level0_y"],
            "tiles": self._tiles,
        }
        try:
            (self._folder / RECORD).write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
            _flush(self._folder)
            self._rename()
        except OSError as error:
            self._stop(error)

    def _rename(self) -> None:
        place, old = self._job.slide_folder(self.slide.name), None
        if place.exists():
            old = self._job.hidden_folder(self.slide.name)
            os.rename(place, old)
        os.rename(self._folder, place)
        self._folder = None
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _stop(self, error: OSError) -> None:
        self.drop()
        raise OutputError.of(error, self._job.slide_folder(self.slide.name)) from error

    def drop(self) -> None:
        """As `HeldSlide.drop`."""
        folder, self._folder, self._tiles = self._folder, None, []
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    # All at the end: by then the system has written most of it by itself.
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
