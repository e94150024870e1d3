"""selective_scan: one scan along time, each group of channels with its own B and C."""

from __future__ import annotations

from torch import Tensor

from ssmamba_models.ops.alignment import all_aligned
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


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backward: bool) -> Scan:
    u, delta, A, B, C, D, z, delta_bias = all_aligned(u, delta, A, B, C, D, z, delta_bias)
    if B.stride() != C.stride():
        B, C = B.contiguous(), C.contiguous()
    groups = B.shape[1]
    walk = Walk(u.shape[0], 1, u.shape[2], groups, u.shape[1] // groups, None, 2, 1)
    projection = (B.stride(0), 0, B.stride(3), B.stride(1), B.stride(2))
    bias = None if delta_bias is None else delta_bias.contiguous()
    skip = None if D is None else D.contiguous()
    return Scan(walk, u, delta, A.contiguous()[None], B, C, skip, bias, projection, delta_softplus, z).cut(backward)


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> tuple[Tensor, Tensor]:
    """See :func:`ssmamba_models.ops.selective_scan`; y and the last state (float32)."""
    scan = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, False)
    summaries = Summaries.empty([scan], False)
    y, last = u.new_empty(u.shape), A.new_empty(u.shape[0], *A.shape)
    summarise(scan, summaries)
    summaries.carry(scan.A, last=last)
    finish(scan, summaries, y)
    return y, last


def selective_scan_backward(
    grad, grad_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias; those of A, B, C, D and delta_bias in float32."""
    scan = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
    grad, state = all_aligned(grad.contiguous(), None if grad_state is None else grad_state.float().contiguous())
    summaries = Summaries.empty([scan], True)
    summarise_backward(scan, grad, summaries)
    summaries.carry(scan.A)
    summaries.carry_adjoints(scan.A, state)
    dB, dC = projection_gradients(scan)
    g = Gradients.empty(scan, u.dtype, dB, dC, True)
    strides = (dB.stride(0), dB.stride(1), 0, dB.stride(4), dB.stride(2), dB.stride(3))
    differentiate(scan, grad, summaries, g, strides)
    dz = u.new_zeros(0) if g.dz is None else g.dz
    dA, dbias = g.dA.sum(0)[0].transpose(0, 1), g.dbias.sum(0)[0]
    return g.du, g.ddelta, dA, dB.sum(0), dC.sum(0), g.dD.sum(0), dz, dbias
