"""Extraction on this machine: processes decode tiles, across the borders of slides; the model takes batch after batch.

A batch holds tiles of one slide, or of one of its bags of shared augmentation, cut at fixed places (tiles 0..B-1,
B..2B-1, ...). So a slide's bytes depend on the batch size and the device alone, not on neighbours, workers, shards or
the point where a killed job was resumed: kernels may round otherwise in a batch of another size (test_ssmamba's do, in
the last bit), and no kernel of a GPU promises the same rounding at another place in the batch. A slide's last batch is
smaller: less than a batch's time for each slide.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from ssmamba_models.wsi.decode_processes import Decoders
from ssmamba_models.wsi.decoding import PrepareTask, ReadTask
from ssmamba_models.wsi.held_slide import Outcomes
from ssmamba_models.wsi.job import Job
from ssmamba_models.wsi.shared_aug import Part
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.slide_run import SlideRun
from ssmamba_models.wsi.slides_ahead import SlidesAhead
from ssmamba_models.wsi.tile_encoder import TileEncoder
from ssmamba_models.wsi.turns import Turns

# Tiles that a process reads at a time: enough to outweigh the asking, few enough that all share a batch.
_CHUNK = 16


@dataclass
class Timing:
    """Where the time of a run went.

    Attributes:
        tiles: that went through the model.
        seconds: in all.
        waiting: the model, or each of several, had no tiles.
        computing: seconds of all models together, waiting included; 0 for one model, which has `seconds`.
    """

    tiles: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    computing: float = 0.0

    @property
    def tiles_per_second(self) -> float:
        return self.tiles / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        of = self.computing or self.seconds
        return self.waiting / of if of else 0.0


@dataclass
class _Batch:
    run: SlideRun
    part: Part
    chunks: list[Future] = field(default_factory=list)
    awaited: bool = False

    @property
    def size(self) -> int:
        return len(self.part.coords)


class LocalEngine:
    """Takes slides through decoding processes and a model.

    Args:
        job: whose settings say how tiles are read.
        encoder: the model.
        decoders: the processes.
        batch_size: B.
        timing: is filled in as time passes.
    """

    def __init__(self, job: Job, encoder: TileEncoder, decoders: Decoders, batch_size: int, timing: Timing):
        self._job, self._encoder, self._decoders = job, encoder, decoders
        self._batch_size, self._timing = batch_size, timing
        self._turns = Turns(encoder.encoder.device)
        self._ahead = SlidesAhead[SlideRun](decoders, self._prepare_task, self._result)
        self._cutting: tuple[SlideRun, Iterator[Part]] | None = None
        self._batches: deque[_Batch] = deque()
        self._tiles_ahead = 0
        pin = encoder.encoder.device.type == "cuda"
        shape = (batch_size, encoder.size, encoder.size, 3)
        # Two in turn: a GPU may still be copying from the one before.
        try:
            self._buffers = deque(torch.empty(shape, dtype=torch.uint8, pin_memory=pin) for _ in range(2))
        except RuntimeError as error:  # what torch raises for any memory that there is not
            raise ValueError(
                f"two batches of {batch_size} tiles do not fit into memory; use a smaller --batch-size"
            ) from error

    def run(self, runs: Iterator[SlideRun], tell: Callable[[int], None] = lambda tiles: None) -> Outcomes:
        """Extract slides.

        Args:
            runs: slides, each claimed when it is drawn from this iterator.
            tell: called with the number of tiles that went through the model.

        Yields:
            How each slide ended.

        Raises:
            OutputError: the job's folder cannot be written.
            ValueError: a batch does not fit into the device's memory.
        """
        # Of earlier slides that it was given, too.
        start, computing = time.perf_counter() - self._timing.seconds, None
        try:
            while True:
                batch = self._next(runs)
                gathered = None if batch is None else self._gather(batch)
                self._fill(runs, idle=False)
                started = None if gathered is None else (batch, gathered[1], self._start(batch, gathered[0]))
                if computing is not None:
                    self._store(*computing, tell)
                computing = started
                self._timing.seconds = time.perf_counter() - start
                yield from self._ahead.ended()
                if batch is None and computing is None:
                    return
        finally:
            self._abandon()

    def _next(self, runs: Iterator[SlideRun]) -> _Batch | None:
        """The next batch of a slide that has not failed; None at the end."""
        while True:
            self._fill(runs, idle=not self._batches)
            if not self._batches:
                return None
            batch = self._batches.popleft()
            self._tiles_ahead -= batch.size
            if batch.run.outcome is None:
                return batch
            _cancel(batch)

    def _fill(self, runs: Iterator[SlideRun], idle: bool) -> None:
        """Have tiles read until there is no more room; where the model is idle, wait for a slide's tissue."""
        while self._tiles_ahead < self._room(idle):
            if self._cutting is None:
                self._ahead.prepare(runs, 1)
                run = self._ahead.begin_next(idle and not self._batches)
                if run is None:
                    break
                if run.outcome is None:
                    self._cutting = (run, run.parts(self._batch_size))
                else:  # without tiles, nothing is to come before the next slides' tissue
                    self._ahead.prepare(runs)
                continue
            run, parts = self._cutting
            part = next(parts, None) if run.outcome is None else None
            if part is None:
                self._cutting = None
            else:
                self._submit(run, part)
        # Later slides' tissue after this one's tiles, which the model waits for.
        self._ahead.prepare(runs)

    def _room(self, idle: bool) -> int:
        """Tiles that may be read ahead: memory is bounded by this, whatever the slides' size."""
        if self._turns.kept:
            return self._batch_size if idle else 0
        # Two batches, and a chunk for each process.
        return 2 * self._batch_size + max(self._decoders.workers, 1) * min(_CHUNK, self._batch_size)

    @property
    def _chunk(self) -> int:
        # In turn, all processes shall have a share of a batch.
        share = -(-self._batch_size // max(self._decoders.workers, 1)) if self._turns.kept else _CHUNK
        return min(share, _CHUNK)

    def _prepare_task(self, slide: SlideFile) -> PrepareTask:
        settings, job = self._job.settings, self._job
        return PrepareTask(
            slide,
            settings.mpp,
            settings.tile_size,
            settings.overlap,
            settings.min_tissue,
            str(job.thumbnails),
            str(job.contours),
        )

    def _submit(self, run: SlideRun, part: Part) -> None:
        settings, batch = self._job.settings, _Batch(run, part)
        chunk = self._chunk
        for start in range(0, batch.size, chunk):
            coords = part.coords[start : start + chunk]
            task = ReadTask(
                run.slide,
                coords,
                settings.mpp,
                settings.tile_size,
                self._encoder.size,
                self._encoder.interpolation,
            )
            batch.chunks.append(self._decoders.submit(task))
        self._batches.append(batch)
        self._tiles_ahead += batch.size

    def _gather(self, batch: _Batch) -> tuple[torch.Tensor, list[tuple[int, str]]] | None:
        """A batch's pixels and bad tiles; None where its slide failed."""
        buffer, place, bad = self._buffers[0], 0, []
        self._buffers.rotate()
        if self._turns.kept and not batch.awaited:
            self._await_readers(batch)
        for chunk in batch.chunks:
            tiles = self._result(batch.run, chunk)
            if tiles is None:
                _cancel(batch)
                return None
            count = len(tiles.pixels)
            buffer[place : place + count] = torch.from_numpy(tiles.pixels)
            bad += [(place + index, reason) for index, reason in tiles.bad]
            place += count
        return buffer[:place], bad

    def _await_readers(self, batch: _Batch) -> None:
        """Wait for all that is read: a slide's last tiles may be few, and the next one's have come with them."""
        start, batches = time.perf_counter(), (batch, *self._batches)
        with self._turns.reading():
            wait([chunk for one in batches for chunk in one.chunks])
        for one in batches:
            one.awaited = True
        self._timing.waiting += time.perf_counter() - start

    def _start(self, batch: _Batch, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self._turns.computing():
            if batch.part.augmentation is None:
                return self._encoder.start(pixels)
            return self._encoder.start_augmented(pixels, batch.part.augmentation)

    def _result(self, run: SlideRun, future: Future) -> Any:
        """What a decoding process answers; None where that is why the slide fails."""
        start = time.perf_counter()
        try:
            return run.answer(future)
        finally:
            self._timing.waiting += time.perf_counter() - start

    def _store(self, batch: _Batch, bad: list[tuple[int, str]], started: tuple, tell: Callable[[int], None]) -> None:
        features, grid = self._encoder.finish(started)
        self._timing.tiles += batch.size
        if batch.run.outcome is None:
            batch.run.take(batch.part, bad, features, grid)
        tell(batch.size)

    def _abandon(self) -> None:
        self._ahead.abandon()
        for batch in self._batches:
            _cancel(batch)


def _cancel(batch: _Batch) -> None:
    for chunk in batch.chunks:
        chunk.cancel()
