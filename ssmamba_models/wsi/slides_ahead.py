"""Slides that are claimed and prepared while the tiles of earlier ones are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from ssmamba_models.wsi.decode_processes import Decoders
from ssmamba_models.wsi.decoding import PrepareTask
from ssmamba_models.wsi.held_slide import HeldSlide, Outcome
from ssmamba_models.wsi.slide_list import SlideFile

Run = TypeVar("Run", bound=HeldSlide)

# Slides whose tissue is looked for while an earlier one's tiles are read.
_SLIDES_AHEAD = 2


class SlidesAhead(Generic[Run]):
    """The slides that an engine holds, from their claim to their end.

    Args:
        decoders: look for their tissue.
        task: how a slide is prepared.
        answer: waits for that (see `HeldSlide.answer`).
    """

    def __init__(
        self, decoders: Decoders, task: Callable[[SlideFile], PrepareTask], answer: Callable[[Run, Future], Any]
    ):
        self._decoders, self._task, self._answer = decoders, task, answer
        self._preparing: deque[tuple[Run, Future]] = deque()
        self._open: list[Run] = []

    def prepare(self, runs: Iterator[Run], ahead: int = _SLIDES_AHEAD) -> None:
        """Claim slides, a few ahead, by drawing them from `runs`, and have them prepared."""
        while len(self._preparing) < ahead and (run := next(runs, None)) is not None:
            self._open.append(run)
            self._preparing.append((run, self._decoders.submit(self._task(run.slide))))

    def begin_next(self, wait: bool) -> Run | None:
        """The next slide, its tiles known unless it ended; None where they are still looked for, or there is none."""
        if not self._preparing or not (wait or self._preparing[0][1].done()):
            return None
        run, future = self._preparing.popleft()
        prepared = self._answer(run, future)
        if prepared is not None:
            run.begin(prepared)
        return run

    def ended(self) -> Iterator[Outcome]:
        """How those slides ended that have since the last call."""
        ended = [run.outcome for run in self._open if run.outcome is not None]
        self._open = [run for run in self._open if run.outcome is None]
        yield from ended

    def abandon(self) -> None:
        """Leave all slides that have not ended as if they had not begun."""
        for run in self._open:
            run.drop()
        for _, future in self._preparing:
            future.cancel()
