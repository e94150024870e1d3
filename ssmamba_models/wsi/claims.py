"""Which slides of a job this process does: those that are neither done nor failed, nor in another's hands."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from ssmamba_models.locks import Lock
from ssmamba_models.notice import SSMambaWarning
from ssmamba_models.wsi.decoding import OutputError
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.held_slide import HeldSlide, Outcomes
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
        self._waiting = self.todo

    def outcomes(self, run: Callable[[Iterator[Run]], Outcomes]) -> Outcomes:
        """Have an engine do the slides, and again as long as the owner of one let it go, or turns out to be dead.

        It waits at the end, when this process holds none, for a sign of life of owners whom it cannot see.

        Args:
            run: does slides, each claimed when it is drawn from the iterator.

        Yields:
            How each slide ended.

        Raises:
            OutputError: the job's folder cannot be written.
        """
        yield from run(self.runs())
        while self._await_owners():
            yield from run(self.runs())

    def _await_owners(self) -> bool:
        locks = self._job.locks
        owners = {slide.name: locks.owner(slide.name) for slide in self._waiting}
        unsure = {name: owner for name, (owner, lives) in owners.items() if not lives}
        if not unsure:
            return False
        first, owner = next(iter(unsure.items()))
        warnings.warn(
            f"{len(unsure)} of {len(self.slides)} slides are held by processes that cannot be seen from here "
            f"({first!r} by {owner}); waiting {locks.patience:.0f} s at most for a sign of life",
            SSMambaWarning,
            stacklevel=3,
        )
        return locks.await_owners(unsure)

    def runs(self) -> Iterator[Run]:
        """Claim slide after slide; one that another process holds gets another chance at the end.

        Raises:
            OutputError: the job's folder cannot be written.
        """
        claimed = True
        while self._waiting and claimed:
            busy, claimed = [], False
            for slide in self._waiting:
                run = self.claim(slide)
                if run is not None:
                    claimed = True
                    yield run
                elif not self._is_settled(slide):
                    busy.append(slide)
            self._waiting = busy

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
