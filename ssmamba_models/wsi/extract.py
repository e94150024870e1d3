"""Whole slides in, a job folder of feature files out: resumed where it was killed, whatever single slides do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ssmamba_models.data.hdf5 import require_h5py
from ssmamba_models.engine.device import resolve_device
from ssmamba_models.progress import progress_bar
from ssmamba_models.stopping import stopped_in_order
from ssmamba_models.threads import threaded
from ssmamba_models.wsi.claims import Claims
from ssmamba_models.wsi.decode_processes import Decoders
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.held_slide import Outcomes
from ssmamba_models.wsi.job import Job
from ssmamba_models.wsi.job_folder import check_root
from ssmamba_models.wsi.job_run import JobResult, follow, job_standing
from ssmamba_models.wsi.local_engine import LocalEngine, Timing
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.tile_encoder import TileEncoder
from ssmamba_models.wsi.turns import default_readers

Places = str | os.PathLike | Iterable[str | os.PathLike]

# Seconds between two versions of summary.csv while a job runs.
_SUMMARY_EVERY = 10.0


@dataclass(frozen=True)
class ExtractResult(JobResult):
    """How a job of extraction stands when this process is done with it: as `JobResult`, and more.

    Attributes:
        features: the folder of its feature files.
        timing: of this process.
    """

    features: Path
    timing: Timing


@threaded
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
    check_root(out)
    if plan.engine == "ray":
        from ssmamba_models.wsi.ray_engine import require_ray

        require_ray()
    workers = default_readers(resolve_device(plan.device)) if plan.workers is None else plan.workers
    with Decoders(workers) as decoders:
        if plan.engine == "local":
            decoders.start()  # they get ready while the model loads
        return _extract(found, out, plan, decoders, progress)


def _extract(
    found: list[SlideFile], out: str | os.PathLike, plan: ExtractPlan, decoders: Decoders, progress: bool
) -> ExtractResult:
    encoder = plan.load()
    provenance = encoder.provenance()
    job = Job(out, plan.settings(encoder, provenance))
    with stopped_in_order(), job:
        job.open(plan.begun_with(encoder.encoder))
        claims = Claims(job, found, plan, provenance, encoder.grid_shape)
        # Not in turn with all other processes that begin now: who is at it writes the same.
        job.write_tables(found, wait=False)
        timing = Timing()
        with progress_bar("extract", "slide", progress, total=len(claims.todo)) as bar:
            outcomes = _outcomes(job, encoder, claims, plan, decoders, timing, bar)
            new = sum(1 for _ in follow(outcomes, job, found, bar, _SUMMARY_EVERY))
        job.write_tables(found)
        return ExtractResult(**job_standing(job, found, new), features=job.features, timing=timing)


def _outcomes(
    job: Job,
    encoder: TileEncoder,
    claims: Claims,
    plan: ExtractPlan,
    decoders: Decoders,
    timing: Timing,
    bar: tqdm,
) -> Outcomes:
    if plan.engine == "ray":
        from ssmamba_models.wsi.ray_engine import run_on_ray

        outcomes = run_on_ray(job, claims, plan, timing)
    else:
        engine = LocalEngine(job, encoder, decoders, plan.batch_size, timing)
        outcomes = claims.outcomes(lambda runs: engine.run(runs, lambda tiles: _tell(timing, bar)))
    with closing(outcomes):
        for outcome in outcomes:
            bar.set_postfix_str(_speed(timing), refresh=False)
            yield outcome


def _tell(timing: Timing, bar: tqdm) -> None:
    bar.set_postfix_str(_speed(timing), refresh=False)
    bar.update(0)


def _speed(timing: Timing) -> str:
    return f"{timing.tiles} tiles, {timing.tiles_per_second:.1f} tiles/s"
