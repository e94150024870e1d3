"""Whole slides in, a job folder of feature files out: resumed where it was killed, whatever single slides do."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ssmamba_models.data.hdf5 import require_h5py
from ssmamba_models.engine.processes import default_workers
from ssmamba_models.wsi.claims import Claims
from ssmamba_models.wsi.decode_processes import Decoders
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.job import Job
from ssmamba_models.wsi.local_engine import LocalEngine, Timing
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.slide_run import Outcome
from ssmamba_models.wsi.status import DONE, FAILED, NO_TISSUE, PENDING, STARTED
from ssmamba_models.wsi.tile_encoder import TileEncoder

Places = str | os.PathLike | Iterable[str | os.PathLike]

# Seconds between two versions of summary.csv while a job runs.
_SUMMARY_EVERY = 10.0


@dataclass(frozen=True)
class ExtractResult:
    """How a job stands when this process is done with it.

    Attributes:
        root: the job's folder.
        features: the folder of its feature files.
        slides: how many the job has.
        done, no_tissue, unfinished: slides; the last are those that other processes work on.
        failed: slide -> reason.
        new: slides that this process ended.
        timing: of this process.
    """

    root: Path
    features: Path
    slides: int
    done: list[str]
    no_tissue: list[str]
    unfinished: list[str]
    failed: dict[str, str]
    new: int
    timing: Timing


def extract_slides(
    slides: Places, out: str | os.PathLike, plan: ExtractPlan | None = None, *, progress: bool = True
) -> ExtractResult:
    """Extract the features of slides into a job folder, or go on with one.

    A slide is done if its file opens and was made with the same settings; others are extracted. A slide that cannot be
    read fails, with its reason in summary.csv and status.jsonl, and the others go on. Several processes, on several
    machines, may work on one job.

    Args:
        slides: files and folders (see `slide_list.find_slides`).
        out: the job's folder; the folder above it must exist.
        plan: how.
        progress: draw a progress bar on stderr.

    Returns:
        How the job stands.

    Raises:
        ValueError: no slide, two of one name, a wrong plan, an unknown model, or a job with other settings.
        FileNotFoundError: a slide, or the folder above `out`, does not exist.
        FileExistsError, NotADirectoryError: `out` is something else than a job.
        OSError: the job's folder cannot be written (the disk is full).
        ImportError: a package is missing.
    """
    plan = plan or ExtractPlan()
    require_h5py()
    found = plan.slides(slides)
    if plan.engine == "ray":
        from ssmamba_models.wsi.ray_engine import require_ray

        require_ray()
    encoder = plan.load()
    provenance = encoder.provenance()
    job = Job(out, plan.settings(encoder, provenance))
    with _stopped_in_order(), job:
        job.open(plan.begun_with(encoder.encoder))
        claims = Claims(job, found, plan, provenance, encoder.grid_shape)
        job.write_summary(found)
        timing = Timing()
        new = 0
        with _progress_bar(len(claims.todo), progress) as bar:
            for _ in _outcomes(job, encoder, claims, plan, timing, bar):
                new += 1
        job.write_summary(found)
        return _result(job, found, new, timing)


def _outcomes(
    job: Job, encoder: TileEncoder, claims: Claims, plan: ExtractPlan, timing: Timing, bar: tqdm
) -> Iterator[Outcome]:
    """Slides as they end; the bar and summary.csv follow."""
    if plan.engine == "ray":
        from ssmamba_models.wsi.ray_engine import run_on_ray

        outcomes = run_on_ray(job, claims, plan, timing)
    else:
        outcomes = _run_here(job, encoder, claims, plan, timing, bar)
    written = time.monotonic()
    with closing(outcomes):
        for outcome in outcomes:
            bar.set_postfix_str(f"{timing.tiles} tiles, {timing.tiles_per_second:.1f} tiles/s", refresh=False)
            bar.update()
            if time.monotonic() - written > _SUMMARY_EVERY:
                job.write_summary(claims.slides, wait=False)
                written = time.monotonic()
            yield outcome


def _run_here(
    job: Job, encoder: TileEncoder, claims: Claims, plan: ExtractPlan, timing: Timing, bar: tqdm
) -> Iterator[Outcome]:
    def tell(tiles: int) -> None:
        bar.set_postfix_str(f"{timing.tiles} tiles, {timing.tiles_per_second:.1f} tiles/s", refresh=False)
        bar.update(0)

    workers = default_workers(encoder.encoder.device, 1) if plan.workers is None else plan.workers
    with Decoders(workers) as decoders:
        engine = LocalEngine(job, encoder, decoders, plan.batch_size, timing)
        with closing(engine.run(claims.runs(), tell)) as outcomes:
            yield from outcomes


def _progress_bar(count: int, progress: bool) -> tqdm:
    # A log file wants a line now and then, not ten a second.
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=count, unit="slide", desc="extract", disable=not progress, mininterval=interval)


def _result(job: Job, slides: list[SlideFile], new: int, timing: Timing) -> ExtractResult:
    latest = job.status.latest()
    names: dict[str, list[str]] = {}
    for slide in slides:
        names.setdefault(latest.get(slide.name, {}).get("status", PENDING), []).append(slide.name)
    return ExtractResult(
        root=job.root,
        features=job.features,
        slides=len(slides),
        done=names.get(DONE, []),
        no_tissue=names.get(NO_TISSUE, []),
        unfinished=names.get(STARTED, []) + names.get(PENDING, []),
        failed={name: latest[name].get("reason", "") for name in names.get(FAILED, [])},
        new=new,
        timing=timing,
    )


@contextmanager
def _stopped_in_order() -> Iterator[None]:
    """Let SIGTERM (a cluster's preemption) end the block as Ctrl-C does: locks released, part files removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
