"""A memory bank: the running feature of every tile, the same on every process."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmamba_models.layers.gather_rows import gather_rows


class FeatureBank(nn.Module):
    """N unit vectors, one per tile, that follow what a network makes of the tiles::

        v <- norm(m v + (1 - m) q)

    A row begins as noise, and its first vector replaces it: until then it is not `seen`, and should not count. All
    processes hold the same rows: each update applies the rows of all of them. Memory: 4 * N * dim bytes.

    Args:
        size: N.
        dim: length of a vector.
        momentum: m, from 0 (only the newest counts) to less than 1.
        seed: of the random unit vectors that it begins with.

    Raises:
        ValueError: an argument out of its range.

    Source: Wu et al., arXiv:1805.01978, sec. 3; SGCL (Medical Image Analysis 89, 102845, 2023).
    """

    def __init__(self, size: int, dim: int, momentum: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a bank of {size} vectors of length {dim}; expected at least 1 of each")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, expected a number from 0 to less than 1")
        self.momentum = momentum
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(size, dim, generator=generator)
        self.register_buffer("rows", F.normalize(rows, dim=1, out=rows))
        self.register_buffer("seen", torch.zeros(size, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.rows)

    def forward(self, index: Tensor) -> Tensor:
        """Copies of rows: (...) int64 -> (..., dim). Later updates leave them as they are."""
        return self.rows[index]

    @torch.no_grad()
    def update(self, index: Tensor, vectors: Tensor) -> None:
        """Let rows follow new vectors, those of all processes.

        Where a row is named twice, the last counts, in the order of the processes and of the batch.

        Args:
            index: (B,) int64, rows; B is the same on all processes.
            vectors: (B, dim), normalised here.
        """
        index, vectors = gather_rows(index), gather_rows(vectors.detach().float())
        index, order = torch.sort(index, stable=True)
        last = torch.ones_like(index, dtype=torch.bool)
        last[:-1] = index[1:] != index[:-1]
        index, vectors = index[last], F.normalize(vectors[order[last]], dim=1)
        momentum = self.momentum * self.seen[index, None]
        self.rows[index] = F.normalize(momentum * self.rows[index] + (1 - momentum) * vectors, dim=1)
        self.seen[index] = True
