"""What a job would do: slides, tiles, and the time that they would take; nothing is written."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from ssmamba_models.engine.processes import default_workers
from ssmamba_models.notice import one_line
from ssmamba_models.progress import progress_bar
from ssmamba_models.threads import threaded
from ssmamba_models.wsi.decode_processes import Decoders
from ssmamba_models.wsi.decoding import Counted, CountTask
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.job import Job
from ssmamba_models.wsi.job_folder import JobFolder, check_root
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.status import DONE, FAILED, NO_TISSUE, PENDING, is_settled
from ssmamba_models.wsi.tile_encoder import TileEncoder
from ssmamba_models.wsi.tiling_plan import TilingPlan

# The model is timed over so many batches and at least so many seconds, after one to warm up; where that takes longer
# than the last number of seconds, over what was done by then.
_BATCHES, _SECONDS, _LONGEST = 3, 2.0, 20.0


@dataclass(frozen=True)
class PlannedSlide:
    """A slide of a dry run.

    Attributes:
        name: the slide.
        status: DONE (nothing to do), PENDING, NO_TISSUE, or FAILED (it cannot be used, or failed before).
        tiles: how many it has.
        mpp, mpp_source: of level 0, and where that comes from.
        reason: why it cannot be used.
    """

    name: str
    status: str
    tiles: int = 0
    mpp: float | None = None
    mpp_source: str = ""
    reason: str = ""


@dataclass(frozen=True)
class DryRun:
    """What a job would do.

    Attributes:
        slides: each of them.
        tiles: of those that are to be done; bag_tiles: of their bags of shared augmentation.
        tiles_per_second: of the model alone, on random tiles.
    """

    slides: list[PlannedSlide]
    tiles: int
    tiles_per_second: float
    bag_tiles: int = 0

    @property
    def seconds(self) -> float:
        """Estimate of the time that the model takes; reading adds a little where it is not done meanwhile."""
        return (self.tiles + self.bag_tiles) / self.tiles_per_second


@threaded
def dry_run(
    slides: Sequence[str | os.PathLike], out: str | os.PathLike, plan: ExtractPlan, *, progress: bool = True
) -> DryRun:
    """Count tiles and time the model, as `extract_slides` with the same arguments would need them.

    Raises:
        As `extract_slides`; nothing is written.
    """
    found = plan.slides(slides)
    check_root(out)
    encoder = plan.load()
    job = Job(out, plan.settings(encoder, encoder.provenance()))
    job.check_place()
    workers = default_workers(None, 1) if plan.workers is None else plan.workers
    planned = count_tiles(job, found, plan, workers, progress=progress)
    pending = [slide.tiles for slide in planned if slide.status == PENDING]
    bag_tiles = len(pending) * plan.shared_aug * plan.shared_aug_tiles
    return DryRun(planned, sum(pending), measure_speed(encoder, plan.batch_size), bag_tiles)


def count_tiles(
    job: JobFolder, slides: list[SlideFile], plan: TilingPlan, workers: int, *, progress: bool
) -> list[PlannedSlide]:
    """What a job would do with each of its slides; nothing is written."""
    with Decoders(workers) as decoders:
        settled = {slide.name: _settled(slide, job, plan) for slide in slides}
        waiting = {slide.name: _submit(decoders, slide, plan) for slide in slides if settled[slide.name] is None}
        bar = progress_bar("count tiles", "slide", progress, items=slides)
        # Each is let go of as soon as it is heard: with an error goes all that was read of the slide.
        return [settled[slide.name] or _plan_slide(slide, waiting.pop(slide.name)) for slide in bar]


def _submit(decoders: Decoders, slide: SlideFile, plan: TilingPlan) -> Future:
    return decoders.submit(CountTask(slide, plan.mpp, plan.tile_size, plan.overlap, plan.min_tissue))


def _settled(slide: SlideFile, job: JobFolder, plan: TilingPlan) -> PlannedSlide | None:
    """What the job would leave as it is; None for what it would do."""
    facts = job.find_done(slide)
    if facts is not None:
        return PlannedSlide(slide.name, DONE, facts["tiles"], facts["mpp"], facts["mpp_source"])
    event = job.status.latest().get(slide.name, {})
    if not is_settled(event, slide, plan.retry_failed):
        return None
    reason = f"failed before, --retry-failed tries it again: {event['reason']}" if event["status"] == FAILED else ""
    return PlannedSlide(slide.name, event["status"], reason=reason)


def _plan_slide(slide: SlideFile, future: Future) -> PlannedSlide:
    try:
        counted: Counted = future.result()
    # As in the job itself: whatever is wrong with a slide is a matter of that slide.
    except Exception as error:
        return PlannedSlide(slide.name, FAILED, reason=one_line(error))
    status = PENDING if counted.tiles else NO_TISSUE
    return PlannedSlide(slide.name, status, counted.tiles, counted.mpp, counted.mpp_source)


def measure_speed(encoder: TileEncoder, batch_size: int, seconds: float = _SECONDS) -> float:
    """Tiles per second of a model that waits for nothing."""
    shape = (batch_size, encoder.size, encoder.size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def seconds_of_batch() -> float:
        start = time.perf_counter()
        encoder.finish(encoder.start(pixels))
        return time.perf_counter() - start

    first = seconds_of_batch()
    times: list[float] = []
    while first + sum(times) < _LONGEST and (len(times) < _BATCHES or sum(times) < seconds):
        times.append(seconds_of_batch())
    return batch_size / statistics.mean(times or [first])
