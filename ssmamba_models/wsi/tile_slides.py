"""Whole slides in, folders of tiles and their manifest out: resumed where it was killed, whatever single slides do."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmamba_models.choices import TILE_SUFFIXES
from ssmamba_models.engine.processes import default_workers
from ssmamba_models.locks import Lock
from ssmamba_models.progress import progress_bar
from ssmamba_models.stopping import stopped_in_order
from ssmamba_models.threads import threaded
from ssmamba_models.wsi.claims import JobClaims
from ssmamba_models.wsi.decode_processes import Decoders
from ssmamba_models.wsi.dry_run import PlannedSlide, count_tiles
from ssmamba_models.wsi.extract import Places
from ssmamba_models.wsi.job_run import JobResult, follow, job_standing
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.tile_engine import TileEngine
from ssmamba_models.wsi.tile_job import TileJob, TileSettings, check_slide_names
from ssmamba_models.wsi.tile_run import TileRun
from ssmamba_models.wsi.tiling_plan import TilingPlan

_QUALITY = 95


@dataclass(frozen=True)
class TilePlan(TilingPlan):
    """How to cut tiles: as `TilingPlan`, and more.

    Attributes:
        format: "png", which keeps every pixel, or "jpeg".
        quality: of JPEG, 1 to 100; None is 95.
        labels: a table (slide,label[,patient][,split]) whose entries the manifest gets; None takes that of an earlier
            run of the same job, if there was one.
    """

    format: str = "png"
    quality: int | None = None
    labels: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in TILE_SUFFIXES:
            raise ValueError(f"format is {self.format!r}, expected one of {', '.join(TILE_SUFFIXES)}")
        if self.quality is not None and self.format != "jpeg":
            raise ValueError(f"quality is {self.quality}, but {self.format} keeps every pixel; give it with jpeg only")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}, expected 1 to 100")

    def settings(self) -> TileSettings:
        """All that decides what the tiles are."""
        return TileSettings(
            mpp=float(self.mpp),
            tile_size=self.tile_size,
            overlap=self.overlap,
            min_tissue=float(self.min_tissue),
            image_format=self.format,
            quality=(self.quality or _QUALITY) if self.format == "jpeg" else None,
        )

    def begun_with(self) -> dict[str, Any]:
        """What config.yaml tells besides: it changes no tile."""
        return {name: getattr(self, name) for name in ("max_bad_tiles", "mpp_override", "mpp_csv", "labels")}


@dataclass(frozen=True)
class TileResult(JobResult):
    """How a job of cutting stands when this process is done with it: as `JobResult`, and more.

    Attributes:
        manifest: the table of all tiles of finished slides.
        tiles: that this process wrote.
        seconds: that it took for them.
    """

    manifest: Path
    tiles: int
    seconds: float


class _TileClaims(JobClaims[TileJob, TileRun]):
    def _hold(self, slide: SlideFile, lock: Lock) -> TileRun:
        return TileRun(self._job, slide, lock, self._plan.max_bad_tiles)


@threaded
def tile_slides(
    slides: Places, out: str | os.PathLike, plan: TilePlan | None = None, *, progress: bool = True
) -> TileResult:
    """Cut the tiles of slides into a job folder, or go on with one.

    The folder gets OUT/<slide>/<x>_<y>.png, x and y being column and row in the slide's grid, a slide.json beside them
    (where they come from, um per pixel, level-0 corners), and manifest.csv, which `read_spatial_tiles` and `read_tiles`
    read. A slide's folder appears when all its tiles are there. A slide that cannot be read fails, with its reason in
    summary.csv and status.jsonl, and the others go on. Several processes, on several machines, may work on one job.

    Args:
        slides: files and folders (see `slide_list.find_slides`).
        out: the job's folder; the folder above it must exist.
        plan: how.
        progress: draw a progress bar on stderr.

    Returns:
        How the job stands.

    Raises:
        ValueError: no slide, two of one name, a wrong plan or table of labels, or a job with other settings.
        FileNotFoundError: a slide, a table, or the folder above `out`, does not exist.
        FileExistsError, NotADirectoryError: `out` is something else than a job.
        OSError: the job's folder cannot be written (the disk is full).
        ImportError: a package is missing.
    """
    plan = plan or TilePlan()
    found, job = _plan_job(slides, out, plan)
    with stopped_in_order(), job:
        job.check_labels([slide.name for slide in found], plan.labels)
        job.open(plan.begun_with())
        if plan.labels is not None:
            job.keep_labels(plan.labels)
        claims = _TileClaims(job, found, plan)
        # Not in turn with all other processes that begin now: who is at it writes the same.
        job.write_tables(found, wait=False)
        start, tiles, new = time.monotonic(), 0, 0

        def tell(count: int) -> None:
            nonlocal tiles
            tiles += count
            bar.set_postfix_str(f"{tiles} tiles, {tiles / (time.monotonic() - start):.1f} tiles/s", refresh=False)
            bar.update(0)

        with (
            progress_bar("tile", "slide", progress, total=len(claims.todo)) as bar,
            Decoders(_workers(plan)) as decoders,
        ):
            engine = TileEngine(job, decoders)
            outcomes = claims.outcomes(lambda runs: engine.run(runs, tell))
            with closing(follow(outcomes, job, found, bar, every=0)) as followed:
                new = sum(1 for _ in followed)
        seconds = time.monotonic() - start
        job.write_tables(found)
        return TileResult(**job_standing(job, found, new), manifest=job.manifest, tiles=tiles, seconds=seconds)


@threaded
def count_slide_tiles(
    slides: Places, out: str | os.PathLike, plan: TilePlan | None = None, *, progress: bool = True
) -> list[PlannedSlide]:
    """Count the tiles that `tile_slides` with the same arguments would cut.

    Raises:
        As `tile_slides`; nothing is written.
    """
    plan = plan or TilePlan()
    found, job = _plan_job(slides, out, plan)
    job.check_labels([slide.name for slide in found], plan.labels)
    return count_tiles(job, found, plan, _workers(plan), progress=progress)


def _plan_job(slides: Places, out: str | os.PathLike, plan: TilePlan) -> tuple[list[SlideFile], TileJob]:
    found = plan.slides(slides)
    check_slide_names(found)
    job = TileJob(out, plan.settings())
    job.check_place()
    return found, job


def _workers(plan: TilePlan) -> int:
    return default_workers(None, 1) if plan.workers is None else plan.workers
