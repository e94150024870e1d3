"""The branches of a block as one node of automatic differentiation each, on the C kernels and torch's products.

One node rather than some dozens saves what each costs, a third of a small step, and lets backward decide what to
recompute. `kept` are the images that stochastic depth leaves a branch (None: all): it is computed for them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmamba_models.models.ssmamba import DirectionalSSM, pool_hold
from ssmamba_models.ops import norm_linear, residual_mlp
from ssmamba_models.ops.alignment import aligned
from ssmamba_models.ops.cpu import backend, rows
from ssmamba_models.ops.reference import DIRECTIONS

_aten = torch.ops.aten
_OWN = 6  # parameters of one scan


def _select(x: Tensor, kept: Tensor | None) -> Tensor:
    return aligned(x.contiguous()) if kept is None else x.index_select(0, kept)


def _replace(x: Tensor, kept: Tensor | None, part: Tensor) -> Tensor:
    """x with other values for the images that are kept."""
    return part if kept is None else x.clone(memory_format=torch.contiguous_format).index_copy_(0, kept, part)


def _zeros(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) for p in parameters]


class LocalPerception(torch.autograd.Function):
    """LPR: x + conv(x) + bias. Shape: (B, H, W, C) -> the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return rows.depthwise3x3(x, weight, bias, silu=False, residual=True) if x.numel() else x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if not x.numel():
            return (grad, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias))
        dx, dweight, dbias = rows.depthwise3x3_backward(grad, x, weight, bias, silu=False, residual=True)
        return dx, dweight, None if bias is None else dbias


class MlpBranch(torch.autograd.Function):
    """x + scale * MLP(LayerNorm(x)). Shape: (B, H, W, C) -> the same."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor | None, scale: float, eps: float, *parameters: Tensor
    ) -> Tensor:
        inside = _select(x, kept)
        y, hidden = residual_mlp.compute(
            rows, inside.view(-1, x.shape[-1]), parameters, eps, scale, keep=any(ctx.needs_input_grad)
        )
        ctx.scale, ctx.eps = scale, eps
        ctx.save_for_backward(inside, hidden, kept, *parameters)
        return _replace(x, kept, y.view(inside.shape))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, kept, *parameters = ctx.saved_tensors
        if not x.numel():
            return (grad, None, None, None, *_zeros(parameters))
        width = x.shape[-1]
        dx, *others = residual_mlp.compute_gradients(
            rows, _select(grad, kept).view(-1, width), hidden, x.view(-1, width), parameters, ctx.eps, ctx.scale
        )
        return (_replace(grad, kept, dx.view(x.shape)), None, None, None, *others)


class ScanSizes(NamedTuple):
    """Of a DMS: pooling factor and width of each scan, and eps of the norms before and after the scans."""

    scales: tuple[int, ...]
    widths: tuple[int, ...]
    eps_before: float
    eps_after: float


def scan_parameters(scan: DirectionalSSM) -> tuple[Tensor, ...]:
    """The parameters of a DirectionalSSM in the order that ScanBranch expects."""
    return scan.x_proj.weight, scan.dt_proj.weight, scan.dt_bias, scan.A_log, scan.B_bias, scan.D


class ScanBranch(torch.autograd.Function):
    """x + scale * DMS(LayerNorm(x)). Shape: (B, H, W, C) -> the same."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        hold: Tensor | None,
        kept: Tensor | None,
        scale: float,
        sizes: ScanSizes,
        *parameters: Tensor,
    ) -> Tensor:
        before, before_bias, after, after_bias, into, conv, conv_bias, out, *own = parameters
        inside = _select(x, kept)
        if not inside.numel():
            ctx.save_for_backward(inside, kept, hold, *parameters)
            return x.clone()
        hold = hold if hold is None or kept is None else hold[kept]
        shape, flat = inside.shape, inside.view(-1, x.shape[-1])
        projected = norm_linear.compute(rows, flat, before, before_bias, into, sizes.eps_before, None, 1.0).view(shape)
        u = rows.depthwise3x3(projected, conv, conv_bias, silu=True, residual=False)
        scanned, saved, first = torch.empty_like(u), [], 0
        for i, (factor, width) in enumerate(zip(sizes.scales, sizes.widths)):
            place = slice(first, first + width)
            y, *inputs = _scan(u[..., place], hold, factor, *own[_OWN * i : _OWN * (i + 1)])
            scanned[..., place] = y
            saved += inputs
            first += width
        y = norm_linear.compute(
            rows, scanned.view(-1, shape[-1]), after, after_bias, out, sizes.eps_after, flat, scale
        )
        ctx.scale, ctx.sizes = scale, sizes
        ctx.save_for_backward(inside, kept, hold, *parameters, projected, u, scanned, *saved)
        return _replace(x, kept, y.view(shape))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, hold, *rest = ctx.saved_tensors
        if not x.numel():
            return (grad, None, None, None, None, *_zeros(rest))
        sizes, count = ctx.sizes, 8 + _OWN * len(ctx.sizes.scales)
        before, before_bias, after, after_bias, into, conv, conv_bias, out, *own = rest[:count]
        projected, u, scanned, *saved = rest[count:]
        width, outer = x.shape[-1], _select(grad, kept)
        g, dafter, dafter_bias, dout = norm_linear.compute_gradients(
            rows, outer.view(-1, width), scanned.view(-1, width), after, after_bias, out, sizes.eps_after, ctx.scale
        )
        g, du, down, first = g.view(x.shape), torch.empty_like(u), [], 0
        for i, (factor, part) in enumerate(zip(sizes.scales, sizes.widths)):
            place = slice(first, first + part)
            inputs = (*own[_OWN * i : _OWN * (i + 1)], *saved[3 * i : 3 * (i + 1)])
            dpart, *dparameters = _scan_gradients(g[..., place], u[..., place], hold, factor, *inputs)
            du[..., place] = dpart
            down += dparameters
            first += part
        dprojected, dconv, dconv_bias = rows.depthwise3x3_backward(
            du, projected, conv, conv_bias, silu=True, residual=False
        )
        dx, dbefore, dbefore_bias, dinto = norm_linear.compute_gradients(
            rows, dprojected.view(-1, width), x.view(-1, width), before, before_bias, into, sizes.eps_before, 1.0,
            add=outer.view(-1, width),
        )  # fmt: skip
        shared = (dbefore, dbefore_bias, dafter, dafter_bias, dinto, dconv, None if conv_bias is None else dconv_bias)
        return (_replace(grad, kept, dx.view(x.shape)), None, None, None, None, *shared, dout, *down)


def _pooled_hold(hold: Tensor | None, factor: int) -> Tensor | None:
    return hold if hold is None or factor == 1 else pool_hold(hold, factor)


def _projections(proj: Tensor, shape: torch.Size, rank: int, states: int) -> tuple[Tensor, Tensor]:
    """B and C (B, H, W, K, N) in what x_proj gave (M, rank + 2 K N)."""
    maps = proj.view(*shape[:3], -1)[..., rank:].unflatten(-1, (2, DIRECTIONS, states))
    return maps[..., 0, :, :], maps[..., 1, :, :]


def _scan(
    u: Tensor,
    hold: Tensor | None,
    factor: int,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    B_bias: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DirectionalSSM's forward; what backward needs beside u: v (empty where it is u), x_proj's result and delta."""
    v = u
    if factor > 1:
        v = F.avg_pool2d(u.permute(0, 3, 1, 2), factor, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1)
    rank, states = dt_proj.shape[1], A_log.shape[2]
    proj = torch.mm(v.reshape(-1, v.shape[3]), x_proj.to(u.dtype).t())
    delta = torch.mm(proj[:, :rank], dt_proj.to(u.dtype).t()).view(v.shape)
    b, c = _projections(proj, v.shape, rank, states)
    b += B_bias.to(b.dtype)
    y = backend.directional_scan(v, delta, -torch.exp(A_log), b, c, D, dt_bias, _pooled_hold(hold, factor))
    if factor > 1:
        y = _aten.upsample_bilinear2d(y.permute(0, 3, 1, 2), u.shape[1:3], False).permute(0, 2, 3, 1)
    return y, u.new_empty(0) if factor == 1 else v, proj, delta


def _scan_gradients(
    grad: Tensor,
    u: Tensor,
    hold: Tensor | None,
    factor: int,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    B_bias: Tensor,
    D: Tensor,
    v: Tensor,
    proj: Tensor,
    delta: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of u and of the parameters."""
    v = u if factor == 1 else v
    if factor > 1:
        small = [len(v), v.shape[3], *v.shape[1:3]]
        grad = _aten.upsample_bilinear2d_backward(grad.permute(0, 3, 1, 2), u.shape[1:3], small, False)
        grad = grad.permute(0, 2, 3, 1)
    rank, states, width = dt_proj.shape[1], A_log.shape[2], v.shape[3]
    A = -torch.exp(A_log)
    b, c = _projections(proj, v.shape, rank, states)
    du, ddelta, dA, dB, dC, dD, dtau = backend.directional_scan_backward(
        grad, v, delta, A, b, c, D, dt_bias, _pooled_hold(hold, factor)
    )
    ddelta, du_rows, dproj = ddelta.view(-1, width), du.view(-1, width), torch.empty_like(proj)
    torch.mm(ddelta, dt_proj.to(u.dtype), out=dproj[:, :rank])
    db, dc = _projections(dproj, v.shape, rank, states)
    db.copy_(dB)
    dc.copy_(dC)
    ddt_proj = torch.mm(ddelta.t(), proj[:, :rank]).to(dt_proj.dtype)
    dx_proj = torch.mm(dproj.t(), v.reshape(-1, width)).to(x_proj.dtype)
    du_rows.addmm_(dproj, x_proj.to(u.dtype))
    if factor > 1:
        du = _aten.avg_pool2d_backward(
            du.permute(0, 3, 1, 2), u.permute(0, 3, 1, 2), [factor] * 2, [factor] * 2, [0, 0], True, False, None
        ).permute(0, 2, 3, 1)
    return du, dx_proj, ddt_proj, dtau, dA * A, dB.sum((0, 1, 2)), dD
