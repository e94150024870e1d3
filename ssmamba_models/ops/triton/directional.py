"""directional_scan: two bidirectional scans, along the rows and along the columns, summed on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmamba_models.ops.alignment import aligned, all_aligned
from ssmamba_models.ops.triton.launch import (
    Gradients,
    Scan,
    Summaries,
    differentiate,
    finish,
    projection_gradients,
    summarise,
    summarise_backward,
)
from ssmamba_models.ops.triton.walk import Walk


def _scans(u, delta, A, B, C, D, delta_bias, hold, backward: bool) -> list[Scan]:
    """The launches along rows and along columns; D u belongs to the first."""
    u, delta, A, B, C, D, delta_bias = all_aligned(u, delta, A, B, C, D, delta_bias)
    if B.stride() != C.stride():
        B, C = B.contiguous(), C.contiguous()
    A, bias = A.contiguous(), None if delta_bias is None else delta_bias.contiguous()
    skip = None if D is None else D.contiguous()
    held = None if hold is None else hold.contiguous().view(torch.uint8)
    scans = []
    for first in (0, 1):
        line, step = (1, 2) if first == 0 else (2, 1)
        walk = Walk(u.shape[0], u.shape[line], u.shape[step], 1, u.shape[3], line, step, 3)
        projection = tuple(B.stride(i) for i in (0, line, step, 3, 4))
        hold_strides = (0, 0) if held is None else (held.stride(line), held.stride(step))
        D = skip if first == 0 else None
        scan = Scan(walk, u, delta, A, B, C, D, bias, projection, True, None, held, hold_strides, first, 2)
        scans.append(scan.cut(backward))
    return scans


def directional_scan(u, delta, A, B, C, D, delta_bias, hold) -> Tensor:
    """See :func:`ssmamba_models.ops.directional_scan`."""
    scans = _scans(u, delta, A, B, C, D, delta_bias, hold, False)
    summaries = Summaries.empty(scans, False)
    for scan in scans:
        summarise(scan, summaries)
    summaries.carry(scans[0].A)
    so_far = u.new_empty(u.shape, dtype=torch.float32)
    y = u.new_empty(u.shape)
    finish(scans[0], summaries, so_far)
    finish(scans[1], summaries, y, so_far)
    return y


def directional_scan_backward(grad, u, delta, A, B, C, D, delta_bias, hold) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D and delta_bias; those of A, D, delta_bias, B and C in float32."""
    scans = _scans(u, delta, A, B, C, D, delta_bias, hold, True)
    grad = aligned(grad.contiguous())
    summaries = Summaries.empty(scans, True)
    for scan in scans:
        summarise_backward(scan, grad, summaries)
    summaries.carry(scans[0].A)
    summaries.carry_adjoints(scans[0].A)
    dB, dC = projection_gradients(scans[0])
    rows = Gradients.empty(scans[0], torch.float32, dB, dC, True)
    columns = Gradients.empty(scans[1], u.dtype, dB, dC, False)
    differentiate(scans[0], grad, summaries, rows, _strides(dB, 2, 3), None)
    differentiate(scans[1], grad, summaries, columns, _strides(dB, 3, 2), rows)
    dA = _interleave(rows.dA.sum(0), columns.dA.sum(0)).transpose(1, 2)
    dbias = _interleave(rows.dbias.sum(0), columns.dbias.sum(0))
    return columns.du, columns.ddelta, dA, dB.sum(0), dC.sum(0), rows.dD.sum(0), dbias


def _strides(dB: Tensor, line: int, step: int) -> tuple[int, ...]:
    return tuple(dB.stride(i) for i in (0, 1, line, step, 4, 5))


def _interleave(rows: Tensor, columns: Tensor) -> Tensor:
    """(2, ...) of directions 0 and 2, and (2, ...) of 1 and 3, as (4, ...)."""
    return torch.stack([rows, columns], 1).flatten(0, 1)
