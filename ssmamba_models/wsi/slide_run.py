"""One slide on its way to a feature file, which is written row by row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ssmamba_models.data.features import SlideFeatureWriter, write_slide_features
from ssmamba_models.locks import Lock
from ssmamba_models.notice import one_line
from ssmamba_models.wsi.decoding import OutputError
from ssmamba_models.wsi.held_slide import HeldSlide
from ssmamba_models.wsi.job import Job
from ssmamba_models.wsi.shared_aug import BagRows, Part, SharedAug
from ssmamba_models.wsi.slide_list import SlideFile


class SlideRun(HeldSlide):
    """A slide whose lock we hold, and whose features are written.

    Args:
        job: the job.
        slide: the slide.
        lock: released at the end.
        attributes: provenance for the file.
        max_bad_tiles: the share of its tiles above which the slide fails.
        grid_shape: of token maps, or None.
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
        super().__init__(job, slide, lock, max_bad_tiles)
        self._attributes, self._grid_shape = attributes, grid_shape
        settings = job.settings
        self._shared_aug = SharedAug(settings.shared_aug, settings.shared_aug_tiles, settings.shared_aug_seed)
        self._bag = BagRows()
        self._context, self._writer = None, None

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
            self.fail("the model returns features that are not finite; check its weights, or use --precision fp32")
        elif part.bag is None:
            self._take_tiles(part, bad, good, features, grid)
        else:
            self._take_bag(part, bad, features)
        if part.last and self.outcome is None:
            self._finish()

    def _take_tiles(
        self, part: Part, bad: list[tuple[int, str]], good: np.ndarray, features: np.ndarray, grid: np.ndarray | None
    ) -> None:
        self._count_bad([(part.rows.start + place, reason) for place, reason in bad], part.rows.stop)
        if self.outcome is not None:
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
            attributes={**self._attributes, **self._origin()},
            dtype=self._job.settings.dtype,
            grid_shape=self._grid_shape,
            bag_tiles=self._shared_aug.tiles if self._shared_aug.bags else None,
            overwrite=True,
        )
        return self._context.__enter__()

    def _put_in_place(self) -> None:
        try:
            self._context.__exit__(None, None, None)
        except (OSError, RuntimeError) as error:
            raise OutputError.of(error, self._job.feature_file(self.slide)) from error

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
