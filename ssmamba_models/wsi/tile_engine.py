"""Cutting on this machine: processes read and encode tiles ahead, across slides' borders; this one writes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from ssmamba_models.wsi.decode_processes import Decoders
from ssmamba_models.wsi.decoding import CutTask, PrepareTask
from ssmamba_models.wsi.held_slide import HeldSlide, Outcomes
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.slides_ahead import SlidesAhead
from ssmamba_models.wsi.tile_job import TileJob
from ssmamba_models.wsi.tile_run import TileRun

# What a process reads at a time: enough tiles to outweigh the asking, but not many large ones.
_CHUNK, _CHUNK_BYTES = 16, 2**24
# Chunks ahead for each process; memory is bounded by this, whatever the slides' size.
_CHUNKS_AHEAD = 2


class TileEngine:
    """Takes slides through decoding processes to folders of tiles.

    Args:
        job: whose settings say how tiles are read and written.
        decoders: the processes.
    """

    def __init__(self, job: TileJob, decoders: Decoders):
        self._settings, self._decoders = job.settings, decoders
        self._chunk = max(1, min(_CHUNK, _CHUNK_BYTES // (3 * job.settings.tile_size**2)))
        self._room = _CHUNKS_AHEAD * max(decoders.workers, 1)
        self._ahead = SlidesAhead[TileRun](decoders, self._prepare_task, HeldSlide.answer)
        self._submitting: tuple[TileRun, Iterator[slice]] | None = None
        self._chunks: deque[tuple[TileRun, slice, Future]] = deque()

    def run(self, runs: Iterator[TileRun], tell: Callable[[int], None]) -> Outcomes:
        """Cut slides.

        Args:
            runs: slides, each claimed when it is drawn from this iterator.
            tell: called with the number of tiles that were written.

        Yields:
            How each slide ended.

        Raises:
            OutputError: the job's folder cannot be written.
        """
        try:
            while True:
                self._fill(runs)
                done = not self._chunks
                if not done:
                    tell(self._take())
                yield from self._ahead.ended()
                if done:
                    return
        finally:
            self._ahead.abandon()
            for _, _, future in self._chunks:
                future.cancel()

    def _fill(self, runs: Iterator[TileRun]) -> None:
        """Have tiles read until there is no more room; wait for a slide's tissue where there is nothing else to do."""
        while True:
            self._ahead.prepare(runs)
            if len(self._chunks) >= self._room:
                return
            if self._submitting is None:
                run = self._ahead.begin_next(wait=not self._chunks)
                if run is None:
                    return
                if run.outcome is None:
                    self._submitting = (run, run.chunks(self._chunk))
                continue
            run, chunks = self._submitting
            rows = next(chunks, None) if run.outcome is None else None
            if rows is None:
                self._submitting = None
            else:
                self._chunks.append((run, rows, self._decoders.submit(self._cut_task(run, rows))))

    def _take(self) -> int:
        run, rows, future = self._chunks.popleft()
        if run.outcome is not None:
            future.cancel()
            return 0
        cuts = run.answer(future)
        if cuts is None:
            return 0
        run.take(rows, cuts)
        return len(cuts.images) - len(cuts.bad)

    def _prepare_task(self, slide: SlideFile) -> PrepareTask:
        settings = self._settings
        return PrepareTask(slide, settings.mpp, settings.tile_size, settings.overlap, settings.min_tissue)

    def _cut_task(self, run: TileRun, rows: slice) -> CutTask:
        settings = self._settings
        return CutTask(
            run.slide,
            run.coords[rows],
            settings.mpp,
            settings.tile_size,
            size=settings.tile_size,
            interpolation="bicubic",
            format=settings.image_format,
            quality=settings.quality,
        )
