"""A teacher whose weights are a moving average of its student's."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import nn


class EmaTeacher(nn.Module):
    """Copies of modules that follow them by an exponential moving average, and get no gradient.

    After step n of N the teacher's weights are moved by::

        theta <- m_n theta + (1 - m_n) theta_student,   m_n = 1 - (1 - momentum) (cos(pi n / N) + 1) / 2

    so m rises from `momentum` to 1 over the training. Without N it stays at `momentum`. Buffers are copied.

    Args:
        students: name -> module. The copies are in eval mode whatever the mode around them.
        momentum: of the first step, in [0, 1].
        steps: N, steps of the whole training; None if unknown.

    Raises:
        ValueError: an argument out of its range, named.

    Example:
        >>> student = nn.Linear(4, 2)
        >>> teacher = EmaTeacher({"head": student}, momentum=0.9)
        >>> teacher.update({"head": student}, step=1)
        >>> teacher["head"](torch.zeros(1, 4)).requires_grad
        False

    Source: mean teacher (arXiv:1703.01780, eq. 2); the schedule: BYOL (arXiv:2006.07733, sec. 3.3).
    """

    def __init__(self, students: Mapping[str, nn.Module], momentum: float = 0.99, steps: int | None = None) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"teacher_momentum is {momentum}, expected 0 to 1")
        if steps is not None and steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1, or None where the training's length is unknown")
        self.momentum, self.steps = momentum, steps
        self.copies = nn.ModuleDict({name: copy.deepcopy(module) for name, module in students.items()})
        self.requires_grad_(False)
        self.train(False)

    def __getitem__(self, name: str) -> nn.Module:
        return self.copies[name]

    def train(self, mode: bool = True) -> EmaTeacher:
        """Stays in eval mode: a teacher drops nothing."""
        return super().train(False)

    def momentum_at(self, step: int) -> float:
        """m after `step` steps."""
        if self.steps is None:
            return self.momentum
        return 1 - (1 - self.momentum) * (math.cos(math.pi * min(step / self.steps, 1.0)) + 1) / 2

    @torch.no_grad()
    def update(self, students: Mapping[str, nn.Module], step: int) -> None:
        """Move towards the students.

        Args:
            students: as given to the constructor, trained since.
            step: steps done.
        """
        share = 1 - self.momentum_at(step)
        for name, copied in self.copies.items():
            student = students[name]
            for parameter, new in zip(copied.parameters(), student.parameters()):
                parameter.lerp_(new, share)
            for buffer, value in zip(copied.buffers(), student.buffers()):
                buffer.copy_(value)
