"""One slide on its way through a job: claimed, prepared, its features written row by row, done or failed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssmamba_models.data.features import SlideFeatureWriter, write_slide_features
from ssmamba_models.data.tile_geometry import level0_side
from ssmamba_models.wsi.decoding import OutputError, Prepared
from ssmamba_models.wsi.errors import TileError, one_line
from ssmamba_models.wsi.job import Job
from ssmamba_models.wsi.locks import Lock
from ssmamba_models.wsi.shared_aug import BagRows, Part, SharedAug
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
        tiles: N in its file.
        reason: why it failed.
    """

    slide: str
    status: str
    tiles: int = 0
    reason: str = ""


class SlideRun:
    """A slide whose lock we hold.

    Args:
        job: the job.
        slide: the slide.
        lock: released at the end.
        attributes: provenance for the file.
        max_bad_tiles: the share of its tiles above which the slide fails.
        grid_shape: of token maps, or None.

    Attributes:
        outcome: None until the slide has ended.
    """

    def __init__(
        self,
        job: Job,
        slide: SlideFile,
        lock: Lock,
        attributes: Mapping[str, Any],
        max_bad_tiles: float,
        grid_shape: tuple[int, ...] | None = None,
    ):
        self.slide, self.outcome = slide, None
        self._job, self._lock = job, lock
        self._attributes, self._grid_shape = attributes, grid_shape
        self._max_bad_tiles = max_bad_tiles
        self._start = time.monotonic()
        self._prepared: Prepared | None = None
        self._bad: list[tuple[int, str]] = []
        settings = job.settings
        self._shared_aug = SharedAug(settings.shared_aug, settings.shared_aug_tiles, settings.shared_aug_seed)
        self._bag = BagRows()
        self._context, self._writer = None, None

    @property
    def coords(self) -> np.ndarray:
        """(N, 2) of all its tiles."""
        return self._prepared.coords

    def begin(self, prepared: Prepared) -> None:
        """Its tiles are known; a slide without any ends here."""
        self._prepared = prepared
        if len(prepared.coords) == 0:
            self._end(Outcome(self.slide.name, NO_TISSUE), tiles=0)

    def parts(self, batch_size: int) -> Iterator[Part]:
        """What goes through the model, cut at fixed places."""
        return self._shared_aug.parts(self.slide.name, self.coords, batch_size)

    def take(self, part: Part, bad: list[tuple[int, str]], features: np.ndarray, grid: np.ndarray | None) -> None:
        """Store a part: all rows but the bad ones (place in the part, reason). Parts come in their order.

        Raises:
            OutputError: the file cannot be written.
        """
        good = np.setdiff1d(np.arange(len(part.coords)), [place for place, _ in bad])
        if not np.isfinite(features[good]).all():
            self.fail("the model returns features that are not finite; check its weights, or run without --bf16")
        elif part.bag is None:
            self._take_tiles(part, bad, good, features, grid)
        else:
            self._take_bag(part, bad, features)
        if part.last and self.outcome is None:
            self._finish()

    def _take_tiles(
        self, part: Part, bad: list[tuple[int, str]], good: np.ndarray, features: np.ndarray, grid: np.ndarray | None
    ) -> None:
        self._bad += [(part.rows.start + place, reason) for place, reason in bad]
        if len(self._bad) > self._max_bad_tiles * len(self.coords):
            first, reason = self._bad[0]
            self.fail(
                f"{len(self._bad)} of the first {part.rows.stop} tiles (of {len(self.coords)}) cannot be read, more "
                f"than --max-bad-tiles {self._max_bad_tiles:g} allows; "
                f"{TileError(*self.coords[first].tolist(), reason)}"
            )
            return
        rows = features[good], part.coords[good], None if grid is None else grid[good]
        self._write(features.shape[1], lambda writer: writer.append(*rows) if len(good) else None)

    def _take_bag(self, part: Part, bad: list[tuple[int, str]], features: np.ndarray) -> None:
        self._bag.add(part, [place for place, _ in bad], features)
        if part.rows.stop == self._shared_aug.tiles:
            bag, self._bag = self._bag, BagRows()
            self._write(features.shape[1], lambda writer: writer.append_bag(*bag.finish()))

    def _write(self, embed_dim: int, act: Callable[[SlideFeatureWriter], None]) -> None:
        try:
            if self._writer is None:
                self._writer = self._open_writer(embed_dim)
            act(self._writer)
        except ValueError as error:  # too large for float16, or a bag without a readable tile
            self.fail(one_line(error))
        except (OSError, RuntimeError) as error:
            self._stop(error)

    def _open_writer(self, embed_dim: int) -> SlideFeatureWriter:
        self._context = write_slide_features(
            self._job.feature_file(self.slide),
            embed_dim,
            coords_attributes=self._geometry(),
            attributes=self._provenance(),
            dtype=self._job.settings.dtype,
            grid_shape=self._grid_shape,
            bag_tiles=self._shared_aug.tiles if self._shared_aug.bags else None,
            overwrite=True,
        )
        return self._context.__enter__()

    def _geometry(self) -> dict[str, Any]:
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
        }

    def _provenance(self) -> dict[str, Any]:
        prepared, settings = self._prepared, self._job.settings
        return {
            **self._attributes,
            **{key: value for key, value in prepared.facts().items() if key != "mpp"},  # `coords` tells it
            "configuration_hash": settings.hash,
            "min_tissue": settings.min_tissue,
            "slide_file": Path(self.slide.path).name,
            "slide_bytes": self.slide.bytes,
            "tiles_in_grid": len(self.coords),
            "reader": prepared.reader,
            "reader_version": importlib.metadata.version(_PACKAGES[prepared.reader]),
        }

    def _finish(self) -> None:
        """The last tile is there: put the file in place, unless another process had to think us dead."""
        if not self._lock.held:
            self.drop()
            self._end(Outcome(self.slide.name, ELSEWHERE), tell=False)
            return
        try:
            self._context.__exit__(None, None, None)
        except ValueError as error:  # all tiles are bad
            self.fail(one_line(error))
            return
        except (OSError, RuntimeError) as error:
            raise OutputError.of(error, self._job.feature_file(self.slide)) from error
        bad = [[*self.coords[place].tolist(), reason] for place, reason in self._bad[:_LISTED]]
        listed = {"bad": bad} if bad else {}
        tiles = len(self.coords) - len(self._bad)
        self._end(Outcome(self.slide.name, DONE, tiles), tiles=tiles, bad_tiles=len(self._bad), **listed)

    def fail(self, reason: str) -> None:
        """End the slide; nothing of it stays but the reason."""
        self.drop()
        self._end(Outcome(self.slide.name, FAILED, reason=reason), reason=reason, bad_tiles=len(self._bad))

    def _end(self, outcome: Outcome, tell: bool = True, **facts: Any) -> None:
        known = {} if self._prepared is None else self._prepared.facts()
        times = {"seconds": round(time.monotonic() - self._start, 2), "bytes": self.slide.bytes}
        try:
            if tell:
                self._job.status.write(outcome.status, outcome.slide, **known, **facts, **times)
        except OSError as error:
            raise OutputError.of(error, self._job.status.path) from error
        finally:
            self._lock.release()
        self.outcome = outcome

    def _stop(self, error: BaseException) -> None:
        self.drop()
        raise OutputError.of(error, self._job.feature_file(self.slide)) from error

    def drop(self) -> None:
        """Leave the slide as if it had not begun, its lock apart."""
        context, self._context, self._writer = self._context, None, None
        if context is not None:
            error = KeyboardInterrupt()
            # Closing a file on a full disk fails again; what counts is that the part file goes.
            with contextlib.suppress(KeyboardInterrupt, OSError, RuntimeError):
                context.__exit__(type(error), error, None)
