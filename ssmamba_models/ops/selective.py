"""selective_scan: Mamba's 1-D scan, as a function and as a registered torch operator."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmamba_models.ops import checks, vectorized
from ssmamba_models.ops.derivatives import register_formula
from ssmamba_models.ops.dispatch import select
from ssmamba_models.ops.gradients import like_inputs, zeros_like_inputs

OP = "selective_scan"
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus"
)


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., return_last_state: Literal[False] = ...,
) -> Tensor:
    """y (B, D, L) alone."""


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., *, return_last_state: Literal[True],
) -> tuple[Tensor, Tensor]:
    """y (B, D, L) and the last state (B, D, N)."""


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., return_last_state: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]:
    """Either of these, where the flag is known at run time only."""


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan: signature, layout and meaning of mamba-ssm's `selective_scan_fn`, for real A.

    ::

        dt_t = delta_t + delta_bias, through softplus if delta_softplus
        h_t  = exp(dt_t A) h_(t-1) + dt_t B_t u_t
        y_t  = (C_t . h_t + D u_t) * silu(z_t)

    The recurrence runs in float32 whatever the dtype (float64 for float64), also under autocast, which casts u,
    delta, B, C and z alone.

    Args:
        u: (B, D, L), float32, bfloat16, float16 or float64.
        delta: (B, D, L), dtype of u.
        A: (D, N).
        B: (B, N, L), or (B, G, N, L) with G dividing D: group g serves channels g*D/G to (g+1)*D/G - 1; or (D, N),
            the same at all times: rounded to the dtype of u, and slow, as every channel is then a group of its own.
            dtype of u.
        C: like B.
        D: (D,) skip weight.
        z: (B, D, L) gate, dtype of u.
        delta_bias: (D,).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return h after the last step; unlike mamba-ssm's, it is differentiable.

    Returns:
        y (B, D, L), dtype of u; with return_last_state also the state (B, D, N), float32 (or float64).

    Raises:
        TypeError: an argument is no tensor, is complex or not floating, or dtypes differ.
        ValueError: a shape or device does not fit, or SSMAMBA_BACKEND forces a backend that cannot run.

    Source: Gu and Dao, Mamba (arXiv:2312.00752), Algorithm 2.
    """
    checks.expect_tensors(OP, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    checks.expect_dims(OP, "u", u, "B, D, L")
    checks.expect_dims(OP, "A", A, "D, N")
    B, C = _same_groups(_grouped("B", B, u, A), _grouped("C", C, u, A))
    u, delta, B, C, z = checks.activations(OP, u, delta=delta, B=B, C=C, z=z)
    A, D, delta_bias = checks.parameters(u, A, D, delta_bias)
    y, state = torch.ops.ssmamba.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, state) if return_last_state else y


def _grouped(name: str, x: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """B or C as (B, G, N, L)."""
    if x.dim() == 2:
        checks.expect_shape(OP, name, x, "D, N", (u.shape[1], A.shape[1]))
        return x.to(u.dtype)[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
    if x.dim() == 3:
        return x[:, None]
    checks.expect_dims(OP, name, x, "B, G, N, L")
    return x


def _same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One of them may serve all channels while the other has groups, or is constant in time."""
    if B.shape[1] == 1 and C.shape[1] > 1:
        B = B.expand(-1, C.shape[1], -1, -1)
    elif C.shape[1] == 1 and B.shape[1] > 1:
        C = C.expand(-1, B.shape[1], -1, -1)
    return B, C


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Run by the operator itself: scripted and exported models call it without the public function."""
    checks.expect_tensors(OP, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    checks.expect_operator_dtypes(OP, (u, delta, B, C, z), (A, D, delta_bias))
    for name, x, layout in (("u", u, "B, D, L"), ("A", A, "D, N"), ("B", B, "B, G, N, L"), ("C", C, "B, G, N, L")):
        checks.expect_dims(OP, name, x, layout)
    batch, channels, length = u.shape
    states = A.shape[1]
    if states < 1:
        raise ValueError(f"{OP}: A has shape {tuple(A.shape)}, expected at least one state (D, N >= 1)")
    checks.expect_shape(OP, "A", A, "D, N", (channels, states))
    checks.expect_shape(OP, "delta", delta, "B, D, L", (batch, channels, length))
    checks.expect_shape(OP, "z", z, "B, D, L", (batch, channels, length))
    for name, x in (("B", B), ("C", C)):
        checks.expect_shape(OP, name, x, "B, G, N, L", (batch, x.shape[1], states, length))
        if x.shape[1] < 1 or channels % x.shape[1]:
            raise ValueError(
                f"{OP}: {name} has {x.shape[1]} groups, expected a number that divides the {channels} channels of u"
            )
    if B.shape[1] != C.shape[1]:
        raise ValueError(f"{OP}: B has {B.shape[1]} groups and C has {C.shape[1]}; expected the same number")
    checks.expect_shape(OP, "D", D, "D,", (channels,))
    checks.expect_shape(OP, "delta_bias", delta_bias, "D,", (channels,))


def _state_dtype(u: Tensor) -> torch.dtype:
    return torch.promote_types(u.dtype, torch.float32)


@torch.library.custom_op("ssmamba::selective_scan", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    _check(u, delta, A, B, C, D, z, delta_bias)
    if u.numel() == 0:
        return u.new_empty(u.shape), A.new_zeros(u.shape[0], *A.shape, dtype=_state_dtype(u))
    backend = select(OP, u, A.shape[1])
    return backend.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


@_forward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    _check(u, delta, A, B, C, D, z, delta_bias)
    return u.new_empty(u.shape), A.new_empty(u.shape[0], *A.shape, dtype=_state_dtype(u))


@torch.library.custom_op(
    "ssmamba::selective_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? grad_state, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    grad_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    _check(u, delta, A, B, C, D, z, delta_bias)
    checks.expect_gradient(OP, grad, u)
    checks.expect_shape(OP, "the state's gradient", grad_state, "B, D, N", (u.shape[0], *A.shape))
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if u.numel() == 0:
        return zeros_like_inputs(inputs)
    backend = select(OP, u, A.shape[1])
    return like_inputs(
        inputs,
        backend.selective_scan_backward(grad, grad_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus),
    )


@_backward.register_fake
def _(
    grad: Tensor,
    grad_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    return zeros_like_inputs((u, delta, A, B, C, D, z, delta_bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.delta_softplus = inputs
    ctx.save_for_backward(*tensors)
    # The state is seldom used: no gradient for it should stay None, not become zeros.
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(saved[0])
    grads = torch.ops.ssmamba.selective_scan_backward(grad, grad_state, *saved, ctx.delta_softplus)
    return (*(None if x is None else g for x, g in zip(saved, grads)), None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _formula(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs[:-1])
    return vectorized.selective_scan(*inputs)


def _backward_formula(grad: Tensor, grad_state: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    _check(*inputs[:-1])
    checks.expect_gradient(OP, grad, inputs[0])
    return like_inputs(inputs[:-1], vectorized.selective_scan_backward(grad, grad_state, *inputs))


register_formula(_forward, _formula)
register_formula(_backward, _backward_formula)


# Per step, channel and state: dt*A, exp, a*h, dtu*b, two additions, c*h; per step and channel: step size, dt*u, D*u.


@register_flop_formula(torch.ops.ssmamba.selective_scan)
def selective_scan_flops(
    u_shape: tuple[int, ...],
    delta_shape: tuple[int, ...],
    A_shape: tuple[int, ...],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Floating point operations of one forward pass."""
    batch, channels, length = u_shape
    return batch * channels * length * (7 * A_shape[1] + 6)


@register_flop_formula(torch.ops.ssmamba.selective_scan_backward)
def selective_scan_backward_flops(
    grad_shape: tuple[int, ...],
    grad_state_shape: tuple[int, ...],
    u_shape: tuple[int, ...],
    delta_shape: tuple[int, ...],
    A_shape: tuple[int, ...],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Floating point operations of one backward pass: the states again, and about twice as much for the gradients."""
    return 3 * selective_scan_flops(u_shape, delta_shape, A_shape)
