"""What running a job shares, whatever it makes: a bar, tables that follow, an end in order, and how the job stands."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ssmamba_models.data.tile_geometry import is_enlarged
from ssmamba_models.wsi.held_slide import Outcomes
from ssmamba_models.wsi.job_folder import JobFolder
from ssmamba_models.wsi.slide_list import SlideFile
from ssmamba_models.wsi.status import DONE, FAILED, NO_TISSUE, PENDING, STARTED

# Tables are not written so often that it takes more than this share of the time.
_TABLE_SHARE = 0.05


@dataclass(frozen=True)
class JobResult:
    """How a job stands when this process is done with it.

    Attributes:
        root: the job's folder.
        slides: how many the job has.
        done, no_tissue, unfinished: slides; the last are those that other processes work on.
        failed: slide -> reason.
        enlarged: slides that are done and were scanned at a coarser mpp than their tiles have.
        new: slides that this process ended.
    """

    root: Path
    slides: int
    done: list[str]
    no_tissue: list[str]
    unfinished: list[str]
    failed: dict[str, str]
    enlarged: list[str]
    new: int


def job_standing(job: JobFolder, slides: list[SlideFile], new: int) -> dict[str, Any]:
    """The arguments of a `JobResult`."""
    latest = job.status.latest()
    names: dict[str, list[str]] = {}
    for slide in slides:
        names.setdefault(latest.get(slide.name, {}).get("status", PENDING), []).append(slide.name)
    return {
        "root": job.root,
        "slides": len(slides),
        "done": names.get(DONE, []),
        "no_tissue": names.get(NO_TISSUE, []),
        "unfinished": names.get(STARTED, []) + names.get(PENDING, []),
        "failed": {name: latest[name].get("reason", "") for name in names.get(FAILED, [])},
        "enlarged": [name for name in names.get(DONE, []) if is_enlarged(latest[name].get("mpp", 0), job.settings.mpp)],
        "new": new,
    }


def follow(outcomes: Outcomes, job: JobFolder, slides: list[SlideFile], bar: tqdm, every: float) -> Outcomes:
    """Slides as they end; the bar and the job's tables follow.

    Args:
        outcomes: is closed at the end.
        job: whose tables are written.
        slides: of the job.
        bar: is moved on.
        every: seconds at least between two versions of the tables.
    """
    written, pause = time.monotonic(), every
    with closing(outcomes):
        for outcome in outcomes:
            bar.update()
            start = time.monotonic()
            if start - written > pause:
                job.write_tables(slides, wait=False)
                written = time.monotonic()
                pause = max(every, (written - start) / _TABLE_SHARE)
            yield outcome
