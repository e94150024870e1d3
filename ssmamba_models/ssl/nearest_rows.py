"""The rows of a bank that are most like a query, and sets of rows, without a dense (queries, bank) matrix at once."""

from __future__ import annotations

import torch
from torch import Tensor

# Similarities held at once: 128 MiB of float32.
LARGEST_BLOCK = 2**25


@torch.no_grad()
def nearest_rows(queries: Tensor, bank: Tensor, count: int, block: int = LARGEST_BLOCK) -> Tensor:
    """The `count` rows with the largest inner product with each query.

    The bank is passed through in chunks, and the best so far are kept: memory is bounded by `block` and the result,
    whatever N. Time: B * N * D multiplications, and a selection of each chunk.

    Args:
        queries: (B, D).
        bank: (N, D).
        count: at most N.
        block: similarities held at once.

    Returns:
        (B, count) int64, the nearest first.

    Raises:
        ValueError: more rows are asked for than there are.
    """
    if not 1 <= count <= len(bank):
        raise ValueError(f"the {count} nearest of {len(bank)} rows were asked for; expected from 1 to {len(bank)}")
    # A chunk smaller than what is kept would sort the same candidates again and again.
    width = max(block // max(len(queries), 1), 2 * count)
    best, places = _most_alike(queries, bank[:width], count)
    for start in range(width, len(bank), width):
        values, found = _most_alike(queries, bank[start : start + width], count)
        values, found = torch.cat([best, values], dim=1), torch.cat([places, found + start], dim=1)
        best, chosen = values.topk(min(count, values.shape[1]), dim=1)
        places = found.gather(1, chosen)
    return places


def _most_alike(queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Inner products with the nearest of these rows, and where they are."""
    similarity = queries @ rows.T
    values, places = similarity.topk(min(count, len(rows)), dim=1)
    return values, places


def row_similarity(queries: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Inner products of each query with rows of its own; gradients flow to the queries.

    Args:
        queries: (B, D).
        bank: (N, D), without gradient; it may change afterwards.
        index: (B, K) int64, rows.

    Returns:
        (B, K).
    """
    if not queries.requires_grad:
        # Nothing is kept for a gradient: a few queries at a time bound the memory.
        rows = max(1, LARGEST_BLOCK // max(index.shape[1] * bank.shape[1], 1))
        parts = zip(queries.split(rows), index.split(rows))
        return torch.cat([torch.einsum("bd,bkd->bk", query, bank[places]) for query, places in parts])
    return torch.einsum("bd,bkd->bk", queries, bank[index])


def unite(index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sets of rows without repetition, as narrow as the largest of them.

    Args:
        index: (B, K) int64.
        valid: (B, K) bool, which of them belong to the set.

    Returns:
        (B, W) int64 and (B, W) bool: the members of each set, in ascending order, then places that do not count and
        hold 0; W is the size of the largest set, at least 1.
    """
    nothing = torch.iinfo(torch.int64).max
    members = torch.where(valid, index, nothing).sort(dim=1).values
    members[:, 1:] = torch.where(members[:, 1:] == members[:, :-1], nothing, members[:, 1:])
    members = members.sort(dim=1).values
    valid = members != nothing
    width = max(1, int(valid.sum(1).max())) if valid.numel() else 1
    members, valid = members[:, :width], valid[:, :width]
    return torch.where(valid, members, 0), valid
