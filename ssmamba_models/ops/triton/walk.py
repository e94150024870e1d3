"""How an operator's tensors are read as sequences, and how those are cut: plain numbers, no triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

THREADS = 128
MOST_STEPS = 16


@dataclass(frozen=True)
class Walk:
    """An image as lines of equal length; step t of line i is at i * line_stride + t * step_stride.

    Attributes:
        line, step: the dimensions of a tensor (batch, ...) that they run along; line None for a single line.
        channel: the dimension of the channels.
    """

    batch: int
    lines: int
    length: int
    groups: int
    group_channels: int
    line: int | None
    step: int
    channel: int

    @property
    def channels(self) -> int:
        return self.groups * self.group_channels

    def strides(self, x: Tensor | None) -> tuple[int, int, int, int]:
        """Of batch, line, step and channel."""
        if x is None:
            return 0, 0, 0, 0
        line = 0 if self.line is None else x.stride(self.line)
        return x.stride(0), line, x.stride(self.step), x.stride(self.channel)


@dataclass(frozen=True)
class Cut:
    """Chunks of `steps` steps; `rows` of them by `block` channels to a program."""

    steps: int
    rows: int
    block: int


def cut(walk: Walk, states: int, backward: bool) -> Cut:
    """A chunk length that wastes little of a line (56 = 7 x 8, 28 = 4 x 7), and a tile to match.

    A thread holds at most 32 values of each tensor (16 in a backward, which holds twice as many tensors), so that
    nothing spills. With many states a chunk's summary is large beside the chunk itself, hence longer chunks.
    """
    most = MOST_STEPS // 2 if states == 1 else MOST_STEPS
    steps = -(-walk.length // -(-walk.length // most))
    block = 32 if walk.group_channels % 32 == 0 or walk.group_channels % 32 > 16 else 16
    return Cut(steps, (16 if backward else 32) * THREADS // (block * most), block)


def chunks_of(walk: Walk, tile: Cut) -> int:
    """How many chunks an image is cut into, over all its lines."""
    return walk.lines * -(-walk.length // tile.steps)


def programs_of(walk: Walk, tile: Cut) -> int:
    """How many programs a launch over all images, groups, chunks and channels takes."""
    tiles = -(-chunks_of(walk, tile) // tile.rows)
    return walk.batch * walk.groups * tiles * -(-walk.group_channels // tile.block)


def span(*tensors: Tensor | None) -> int:
    """The farthest element of one image from its start, over all tensors."""
    ends = [0]
    for x in tensors:
        if x is not None:
            ends.append(sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:])))
    return max(ends)


def is_fast(u: Tensor) -> bool:
    """16-bit inputs carry far less than the shorter polynomial loses."""
    return u.dtype in (torch.bfloat16, torch.float16)
