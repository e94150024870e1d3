"""A slide on its way through a job: claimed, prepared, its tiles taken, done or failed."""

from __future__ import annotations

import abc
import importlib.metadata
import time
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssmamba_models.data.tile_geometry import ORIGIN, level0_side
from ssmamba_models.locks import Lock
from ssmamba_models.notice import one_line
from ssmamba_models.wsi.decode_processes import DecoderDied
from ssmamba_models.wsi.decoding import OutputError, Prepared
from ssmamba_models.wsi.errors import SlideError, TileError
from ssmamba_models.wsi.job_folder import JobFolder
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.status import DONE, ELSEWHERE, FAILED, NO_TISSUE

# Bad tiles that status.jsonl lists with their reasons.
_LISTED = 20
_PACKAGES = {"openslide": "openslide-python", "tifffile": "tifffile", "pil": "pillow"}


@dataclass
class Outcome:
    """How a slide ended.

    Attributes:
        slide: its name.
        status: DONE, NO_TISSUE, FAILED, or ELSEWHERE (another process had to think us dead).
        tiles: N in its output.
        reason: why it failed.
    """

    slide: str
    status: str
    tiles: int = 0
    reason: str = ""


# How slides end, one by one; whoever draws from it closes it.
Outcomes = Generator[Outcome, None, None]


class HeldSlide(abc.ABC):
    """A slide whose lock we hold.

    Args:
        job: the job.
        slide: the slide.
        lock: released at the end.
        max_bad_tiles: the share of its tiles above which the slide fails.

    Attributes:
        outcome: None until the slide has ended.
    """

    def __init__(self, job: JobFolder, slide: SlideFile, lock: Lock, max_bad_tiles: float):
        self.slide = slide
        self.outcome: Outcome | None = None
        self._job, self._lock = job, lock
        self._max_bad_tiles = max_bad_tiles
        self._start = time.monotonic()
        self._prepared: Prepared | None = None
        self._bad: list[tuple[int, str]] = []

    @property
    def coords(self) -> np.ndarray:
        """(N, 2) of all its tiles."""
        return self._prepared.coords

    def answer(self, future: Future) -> Any:
        """What a decoding process answers; None where that is why the slide fails.

        Raises:
            OutputError: the job's folder cannot be written.
        """
        try:
            return future.result()
        except OutputError:
            raise
        except DecoderDied as error:
            self._job.clean_slide(self.slide)
            self.fail(one_line(error))
        except (SlideError, OSError) as error:
            self.fail(one_line(error))
        # One slide on which a library stumbles in its own way must not stop a job over thousands.
        except Exception as error:
            self.fail(f"{type(error).__name__}: {one_line(error)}")
        return None

    def begin(self, prepared: Prepared) -> None:
        """Its tiles are known; a slide without any ends here."""
        self._prepared = prepared
        if len(prepared.coords) == 0:
            reason = f"no tile has --min-tissue {self._job.settings.min_tissue:g} of tissue"
            facts = {"reason": reason} if prepared.tissue_share > 0 else {}
            self._end(Outcome(self.slide.name, NO_TISSUE), tiles=0, **facts)

    def _count_bad(self, bad: list[tuple[int, str]], seen: int) -> None:
        """Note bad tiles (place among all, reason) of the first `seen`; too many fail the slide."""
        self._bad += bad
        if len(self._bad) > self._max_bad_tiles * len(self.coords):
            first, reason = self._bad[0]
            self.fail(
                f"{len(self._bad)} of the first {seen} tiles (of {len(self.coords)}) cannot be read, more "
                f"than --max-bad-tiles {self._max_bad_tiles:g} allows; "
                f"{TileError(*self.coords[first].tolist(), reason)}"
            )

    def _geometry(self) -> dict[str, Any]:
        """Where its tiles lie and how large they are (see `data.tile_geometry`)."""
        prepared, settings = self._prepared, self._job.settings
        return {
            "patch_size": settings.tile_size,
            "patch_size_level0": level0_side(settings.tile_size, settings.mpp, prepared.mpp),
            "overlap": settings.overlap,
            "level0_mpp": prepared.mpp,
            "target_mpp": settings.mpp,
            "level0_width": prepared.dimensions[0],
            "level0_height": prepared.dimensions[1],
            "name": self.slide.name,
            # Most slides have none, and their files stay as they were.
            **(dict(zip(ORIGIN, prepared.origin)) if any(prepared.origin) else {}),
        }

    def _origin(self) -> dict[str, Any]:
        """What tells where the output comes from."""
        prepared = self._prepared
        return {
            **{key: value for key, value in prepared.facts().items() if key != "mpp"},  # the geometry tells it
            "configuration_hash": self._job.settings.hash,
            "min_tissue": self._job.settings.min_tissue,
            "slide_file": Path(self.slide.path).name,
            "slide_bytes": self.slide.bytes,
            "tiles_in_grid": len(self.coords),
            "reader": prepared.reader,
            "reader_version": importlib.metadata.version(_PACKAGES[prepared.reader]),
        }

    def _finish(self) -> None:
        """The last tile is there: put the output in place, unless another process had to think us dead."""
        if not self._lock.held:
            self.drop()
            self._end(Outcome(self.slide.name, ELSEWHERE), tell=False)
            return
        try:
            self._put_in_place()
        except ValueError as error:  # all tiles are bad
            self.fail(one_line(error))
            return
        bad = [[*self.coords[place].tolist(), reason] for place, reason in self._bad[:_LISTED]]
        listed = {"bad": bad} if bad else {}
        tiles = len(self.coords) - len(self._bad)
        self._end(Outcome(self.slide.name, DONE, tiles), tiles=tiles, bad_tiles=len(self._bad), **listed)

    @abc.abstractmethod
    def _put_in_place(self) -> None:
        """Make the output appear (ValueError: there is nothing in it; OutputError: it cannot be written)."""

    def fail(self, reason: str) -> None:
        """End the slide; nothing of it stays but the reason."""
        self.drop()
        self._end(Outcome(self.slide.name, FAILED, reason=reason), reason=reason, bad_tiles=len(self._bad))

    def _end(self, outcome: Outcome, tell: bool = True, **facts: Any) -> None:
        known = {} if self._prepared is None else self._prepared.facts()
        given = {} if self.slide.mpp is None else {"given_mpp": self.slide.mpp}
        times = {"seconds": round(time.monotonic() - self._start, 2), "bytes": self.slide.bytes}
        try:
            if outcome.status in (FAILED, NO_TISSUE) and self._lock.held:
                self._job.discard_obsolete(self.slide)
            if tell:
                self._job.status.write(outcome.status, outcome.slide, **known, **given, **facts, **times)
        except OSError as error:
            raise OutputError.of(error, self._job.status.path) from error
        finally:
            self._lock.release()
        self.outcome = outcome

    @abc.abstractmethod
    def drop(self) -> None:
        """Leave the slide as if it had not begun, its lock apart."""
