"""Which slides of a job this process does: those that are neither done nor failed, nor in another's hands."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from ssmamba_models.locks import Lock
from ssmamba_models.wsi.decoding import OutputError
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.held_slide import HeldSlide
from ssmamba_models.wsi.job import Job
from ssmamba_models.wsi.job_folder import JobFolder
from ssmamba_models.wsi.slide_list import SlideFile, shard_order
from ssmamba_models.wsi.slide_run import SlideRun
from ssmamba_models.wsi.status import DONE, STARTED, is_settled
from ssmamba_models.wsi.tiling_plan import TilingPlan

AnyJob = TypeVar("AnyJob", bound=JobFolder)
Run = TypeVar("Run", bound=HeldSlide)


class JobClaims(abc.ABC, Generic[AnyJob, Run]):
    """The slides of a job, to be drawn one by one.

    Args:
        job: the open job.
        slides: all of it.
        plan: says whether failed slides are tried again, and which shard this is.

    Attributes:
        todo: what was neither done nor settled at the beginning, in the order of this shard.

    Raises:
        ValueError: a slide was done at another mpp than is now given.
    """

    def __init__(self, job: AnyJob, slides: list[SlideFile], plan: TilingPlan):
        self.slides = slides
        self._job, self._plan = job, plan
        self.todo = shard_order([slide for slide in slides if not self._is_settled(slide)], plan.shard)

    def runs(self) -> Iterator[Run]:
        """Claim slide after slide; one that another process holds gets another chance at the end.

        Raises:
            OutputError: the job's folder cannot be written.
        """
        waiting, claimed = self.todo, True
        while waiting and claimed:
            busy, claimed = [], False
            for slide in waiting:
                run = self.claim(slide)
                if run is not None:
                    claimed = True
                    yield run
                elif not self._is_settled(slide):
                    busy.append(slide)
            waiting = busy

    def claim(self, slide: SlideFile, timeout: float = 0.0) -> Run | None:
        """Lock a slide.

        Args:
            slide: the slide.
            timeout: seconds to wait for one who holds it.

        Returns:
            The slide, to be done; None where it is done, or another process has it.

        Raises:
            OutputError: the job's folder cannot be written.
        """
        try:
            lock = self._job.locks.acquire(slide.name, timeout)
            if lock is None:
                return None
            # Its last owner may have finished between our look and our lock.
            if self._is_settled(slide, locked=True):
                lock.release()
                return None
            self._job.clean_slide(slide)
            self._job.status.write(STARTED, slide.name)
        except OSError as error:
            raise OutputError.of(error, self._job.root) from error
        return self._hold(slide, lock)

    @abc.abstractmethod
    def _hold(self, slide: SlideFile, lock: Lock) -> Run:
        """The slide, locked."""

    def _is_settled(self, slide: SlideFile, locked: bool = False) -> bool:
        facts = self._job.find_done(slide)
        event = self._job.status.latest().get(slide.name, {})
        if facts is not None:
            if event.get("status") != DONE:
                self._tell_done(slide, facts, locked)
            return True
        return is_settled(event, slide, self._plan.retry_failed)

    def _tell_done(self, slide: SlideFile, facts: dict[str, Any], locked: bool) -> None:
        """Log a slide whose file is there, but whose process was killed before it could say so."""
        lock = None if locked else self._job.locks.acquire(slide.name)
        if lock is None and not locked:
            return  # its owner lives, and will tell
        try:
            if self._job.status.latest().get(slide.name, {}).get("status") != DONE:
                self._job.clean_slide(slide)
                self._job.status.write(DONE, slide.name, **facts, bytes=slide.bytes)
        finally:
            if lock is not None:
                lock.release()


class Claims(JobClaims[Job, SlideRun]):
    """The slides of a job of extraction.

    Args:
        job, slides, plan: as `JobClaims`.
        provenance: attributes for the feature files.
        grid_shape: of token maps, or None.

    Raises:
        ValueError: as `JobClaims`.
    """

    def __init__(
        self,
        job: Job,
        slides: list[SlideFile],
        plan: ExtractPlan,
        provenance: Mapping[str, Any],
        grid_shape: tuple[int, ...] | None,
    ):
        self._provenance, self._grid_shape = provenance, grid_shape
        super().__init__(job, slides, plan)

    def _hold(self, slide: SlideFile, lock: Lock) -> SlideRun:
        return SlideRun(self._job, slide, lock, self._provenance, self._plan.max_bad_tiles, self._grid_shape)
