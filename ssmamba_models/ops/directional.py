"""directional_scan: the operator of the DMS module, as a function and as a registered torch operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmamba_models.ops import checks, vectorized
from ssmamba_models.ops.derivatives import register_formula
from ssmamba_models.ops.dispatch import select
from ssmamba_models.ops.gradients import like_inputs, zeros_like_inputs
from ssmamba_models.ops.reference import DIRECTIONS

OP = "directional_scan"
_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor? hold"


def directional_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    hold: Tensor | None = None,
) -> Tensor:
    """Scan a map along its rows, its columns, and both in reverse; add the four results.

    In direction k, along the H*W pixels in its order::

        dt_t = softplus(delta_t + delta_bias_k), or 0 where hold_t
        h_t  = exp(dt_t A_k) h_(t-1) + dt_t B_(k,t) u_t
        y   += C_(k,t) . h_t

    and `D * u` is added once. The recurrence runs in float32 whatever the dtype (float64 for float64), also under
    autocast, which casts u, delta, B and C alone.

    Args:
        u: (B, H, W, D) input, float32, bfloat16, float16 or float64.
        delta: (B, H, W, D) step sizes before bias and softplus, dtype of u.
        A: (4, D, N), negative for a decaying state. Directions: rows, columns, rows reversed, columns reversed.
        B: (B, H, W, 4, N) input projection, dtype of u.
        C: (B, H, W, 4, N) output projection, dtype of u.
        D: (D,) skip weight.
        delta_bias: (4, D).
        hold: (B, H, W) bool. The state passes a held pixel untouched.

    Returns:
        y (B, H, W, D), dtype of u.

    Raises:
        TypeError: an argument is no tensor, has a non-floating dtype (hold: is not bool), or dtypes differ.
        ValueError: a shape or device does not fit, or SSMAMBA_BACKEND forces a backend that cannot run.

    Source: VMamba's SS2D (arXiv:2401.10166) with Mamba's recurrence (arXiv:2312.00752); the hold mask is ours.
    """
    checks.expect_tensors(OP, u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    if hold is not None:
        _expect_mask(hold)
    u, delta, B, C = checks.activations(OP, u, delta=delta, B=B, C=C)
    A, D, delta_bias = checks.parameters(u, A, D, delta_bias)
    return torch.ops.ssmamba.directional_scan(u, delta, A, B, C, D, delta_bias, hold)


def _expect_mask(hold: Tensor | None) -> None:
    if not isinstance(hold, Tensor) or hold.dtype != torch.bool:
        kind = hold.dtype if isinstance(hold, Tensor) else type(hold).__name__
        raise TypeError(f"{OP}: hold must be a bool tensor, not {kind}; compare or cast it with .bool()")


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    hold: Tensor | None,
) -> None:
    """Run by the operator itself: scripted and exported models call it without the public function."""
    checks.expect_tensors(OP, u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    checks.expect_operator_dtypes(OP, (u, delta, B, C), (A, D, delta_bias))
    checks.expect_dims(OP, "u", u, "B, H, W, D")
    checks.expect_dims(OP, "A", A, "K, D, N")
    batch, height, width, channels = u.shape
    states = A.shape[2]
    if states < 1:
        raise ValueError(f"{OP}: A has shape {tuple(A.shape)}, expected at least one state (K, D, N >= 1)")
    checks.expect_shape(OP, "A", A, "K, D, N", (DIRECTIONS, channels, states))
    checks.expect_shape(OP, "delta", delta, "B, H, W, D", (batch, height, width, channels))
    projection = (batch, height, width, DIRECTIONS, states)
    checks.expect_shape(OP, "B", B, "B, H, W, K, N", projection)
    checks.expect_shape(OP, "C", C, "B, H, W, K, N", projection)
    checks.expect_shape(OP, "D", D, "D,", (channels,))
    checks.expect_shape(OP, "delta_bias", delta_bias, "K, D", (DIRECTIONS, channels))
    if hold is not None:
        _expect_mask(hold)
        if hold.device != u.device:
            raise ValueError(f"{OP}: hold is on {hold.device}, but u is on {u.device}; move them to one device")
        checks.expect_shape(OP, "hold", hold, "B, H, W", (batch, height, width))


@torch.library.custom_op("ssmamba::directional_scan", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    hold: Tensor | None,
) -> Tensor:
    _check(u, delta, A, B, C, D, delta_bias, hold)
    if u.numel() == 0:
        return u.new_empty(u.shape)
    return select(OP, u, A.shape[2]).directional_scan(u, delta, A, B, C, D, delta_bias, hold)


@_forward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    hold: Tensor | None,
) -> Tensor:
    _check(u, delta, A, B, C, D, delta_bias, hold)
    return u.new_empty(u.shape)


@torch.library.custom_op(
    "ssmamba::directional_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    hold: Tensor | None,
) -> tuple[Tensor, ...]:
    _check(u, delta, A, B, C, D, delta_bias, hold)
    checks.expect_gradient(OP, grad, u)
    inputs = (u, delta, A, B, C, D, delta_bias)
    if u.numel() == 0:
        return zeros_like_inputs(inputs)
    backend = select(OP, u, A.shape[2])
    return like_inputs(inputs, backend.directional_scan_backward(grad, u, delta, A, B, C, D, delta_bias, hold))


@_backward.register_fake
def _(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    hold: Tensor | None,
) -> tuple[Tensor, ...]:
    return zeros_like_inputs((u, delta, A, B, C, D, delta_bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.ssmamba.directional_scan_backward(grad, *saved)
    return (*(None if x is None else g for x, g in zip(saved, grads)), None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _formula(*inputs: Any) -> Tensor:
    _check(*inputs)
    return vectorized.directional_scan(*inputs)


def _backward_formula(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    _check(*inputs)
    checks.expect_gradient(OP, grad, inputs[0])
    return like_inputs(inputs[:-1], vectorized.directional_scan_backward(grad, *inputs))


register_formula(_forward, _formula)
register_formula(_backward, _backward_formula)


# Per step, channel and state: dt*A, exp, a*h, dtu*b, two additions, c*h; per step and channel: the step size and dt*u.


@register_flop_formula(torch.ops.ssmamba.directional_scan)
def directional_scan_flops(
    u_shape: tuple[int, ...],
    delta_shape: tuple[int, ...],
    A_shape: tuple[int, ...],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Floating point operations of one forward pass."""
    batch, height, width, channels = u_shape
    return DIRECTIONS * batch * height * width * channels * (7 * A_shape[2] + 4)


@register_flop_formula(torch.ops.ssmamba.directional_scan_backward)
def directional_scan_backward_flops(
    grad_shape: tuple[int, ...],
    u_shape: tuple[int, ...],
    delta_shape: tuple[int, ...],
    A_shape: tuple[int, ...],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Floating point operations of one backward pass: the states again, and about twice as much for the gradients."""
    return 3 * directional_scan_flops(u_shape, delta_shape, A_shape)
