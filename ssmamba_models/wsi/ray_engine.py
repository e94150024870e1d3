"""Extraction on a Ray cluster: one task for each slide, tried again where its process or its machine dies.

All machines must see the slides and the job's folder under the same paths, and have this package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import time
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ssmamba_models.locks import STALE
from ssmamba_models.notice import SSMambaWarning, one_line
from ssmamba_models.stopping import stopped_in_order
from ssmamba_models.threads import threaded
from ssmamba_models.wsi.claims import Claims
from ssmamba_models.wsi.decode_processes import Decoders
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.held_slide import Outcome, Outcomes
from ssmamba_models.wsi.job import Job
from ssmamba_models.wsi.local_engine import LocalEngine, Timing
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.status import ELSEWHERE
from ssmamba_models.wsi.tile_encoder import TileEncoder
from ssmamba_models.wsi.turns import default_readers

# Tasks that wait in the cluster at a time; thousands would only cost its memory.
_AHEAD = 256

# A task's second try may meet the lock of the first, whose machine is gone.
_LOCK_TIMEOUT = 1.25 * STALE


def require_ray() -> ModuleType:
    """Import Ray, which only clusters need.

    Raises:
        ImportError: it is missing or broken; the message names the extra that installs it.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            f'--engine ray needs Ray ({one_line(error)}); install it with: pip install "ssmamba-models[cluster]"'
        ) from error
    return ray


def run_on_ray(job: Job, claims: Claims, plan: ExtractPlan, timing: Timing) -> Outcomes:
    """Extract slides on the cluster that RAY_ADDRESS names or this machine belongs to, else on one of this machine.

    Args:
        job: the open job.
        claims: its slides.
        plan: how, and what each task asks of the cluster.
        timing: is filled in as tasks end.

    Yields:
        How each slide ended.

    Raises:
        OutputError, ValueError: as the local engine.
        ImportError: Ray is missing.
    """
    ray = require_ray()
    with _cluster(ray):
        task = ray.remote(_extract_slide).options(
            num_cpus=plan.num_cpus, num_gpus=plan.num_gpus, max_retries=plan.max_retries
        )
        # A process of the cluster need not work in our folder.
        if plan.checkpoint is not None:
            plan = dataclasses.replace(plan, checkpoint=os.path.abspath(plan.checkpoint))
        root, start = os.path.abspath(job.root), time.perf_counter()
        waiting: dict[Any, SlideFile] = {}
        todo = iter(claims.todo)
        while True:
            while len(waiting) < _AHEAD and (slide := next(todo, None)) is not None:
                waiting[task.remote(slide, root, plan)] = slide
            if not waiting:
                return
            (ready, *_), _ = ray.wait(list(waiting))
            outcome, part = _result(ray, ready, claims, waiting.pop(ready))
            _add(timing, part, time.perf_counter() - start)
            yield outcome


def _add(timing: Timing, part: Timing, seconds: float) -> None:
    """Add a task's time; the share of waiting is that of all tasks, whose clocks ran side by side."""
    timing.tiles += part.tiles
    timing.computing += part.seconds
    timing.waiting += part.waiting
    timing.seconds = seconds


@contextlib.contextmanager
def _cluster(ray: ModuleType) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    ray.init(logging_level=logging.WARNING, include_dashboard=False)
    try:
        # Ray has just taken SIGTERM for itself, and would end the process with another exit code.
        with stopped_in_order():
            yield
    finally:
        ray.shutdown()


def _result(ray: ModuleType, ready: Any, claims: Claims, slide: SlideFile) -> tuple[Outcome, Timing]:
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        # What the task raised concerns the whole job: bad slides are outcomes.
        raise error.cause from error
    except ray.exceptions.RayError as error:
        reason = f"the process or machine that had it died again and again ({one_line(error)[:300]})"
        run = claims.claim(slide, _LOCK_TIMEOUT)
        if run is None:
            return Outcome(slide.name, ELSEWHERE), Timing()
        run.fail(reason)
        return run.outcome, Timing()


@threaded
def _extract_slide(slide: SlideFile, root: str, plan: ExtractPlan) -> tuple[Outcome, Timing]:
    """The task: one slide, in a process of the cluster."""
    encoder = _encoder(plan)
    provenance = encoder.provenance()
    timing = Timing()
    with Job(root, plan.settings(encoder, provenance)) as job:
        job.check_settings()
        claims = Claims(job, [slide], plan, provenance, encoder.grid_shape)
        run = claims.claim(slide, _LOCK_TIMEOUT)
        if run is None:
            return Outcome(slide.name, ELSEWHERE), timing
        workers = default_readers(encoder.encoder.device) if plan.workers is None else plan.workers
        with Decoders(workers) as decoders:
            engine = LocalEngine(job, encoder, decoders, plan.batch_size, timing)
            (outcome,) = engine.run(iter([run]))
    return outcome, timing


@functools.lru_cache(maxsize=1)
def _encoder(plan: ExtractPlan) -> TileEncoder:
    # A process of the cluster does slide after slide with one model.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SSMambaWarning)  # the process that began the job has said it
        return plan.load()
