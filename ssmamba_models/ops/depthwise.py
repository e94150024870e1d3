"""depthwise3x3: the convolution of LPR and DMS with what follows it, as a function and as a torch operator."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmamba_models.ops import checks
from ssmamba_models.ops.derivatives import register_formula
from ssmamba_models.ops.gradients import like_inputs, pulled_back, zeros_like_inputs
from ssmamba_models.ops.rowwise import is_served_by_c

OP = "depthwise3x3"
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, bool residual"


def depthwise3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False, residual: bool = False
) -> Tensor:
    """Each channel of a map convolved with its own kernel, zeros around the map.

    ``y = conv(x) + bias``, with `residual` ``+ x``, then with `silu` ``SiLU(y)``. Backward recomputes the convolution
    rather than store what SiLU was applied to. On a CPU in float32, bfloat16 and float16 one pass of the C kernel each
    way, which computes in float32; elsewhere, and where SSMAMBA_BACKEND asks for another backend, torch's own. Under
    autocast x is cast, as for a convolution.

    Args:
        x: (B, H, W, C), float32, bfloat16, float16 or float64.
        weight: (C, 1, 3, 3). bias: (C,).
        silu: apply SiLU.
        residual: add x.

    Returns:
        y (B, H, W, C), contiguous, dtype of x.

    Raises:
        TypeError: an argument is no tensor or has a non-floating dtype.
        ValueError: a shape or device does not fit, or SSMAMBA_BACKEND names no backend.

    Source: with `residual` the local perception unit of CMT (arXiv:2107.06263, eq. 2); with `silu` what stands before
    the scan in VMamba (arXiv:2401.10166).

    Example::

        y = depthwise3x3(torch.randn(2, 14, 14, 320), torch.randn(320, 1, 3, 3), silu=True)  # (2, 14, 14, 320)
    """
    checks.expect_tensors(OP, x=x, weight=weight, bias=bias)
    (x,) = checks.activations(OP, x)
    weight, bias = checks.parameters(x, weight, bias)
    return torch.ops.ssmamba.depthwise3x3(x, weight, bias, silu, residual)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Run by the operator itself: scripted and exported models call it without the public function."""
    checks.expect_tensors(OP, x=x, weight=weight, bias=bias)
    checks.expect_operator_dtypes(OP, (x,), (weight, bias))
    checks.expect_dims(OP, "x", x, "B, H, W, C")
    checks.expect_shape(OP, "weight", weight, "C, 1, 3, 3", (x.shape[3], 1, 3, 3))
    checks.expect_shape(OP, "bias", bias, "C,", (x.shape[3],))


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, residual: bool) -> Tensor:
    if x.numel() == 0:  # torch's convolution refuses maps without pixels
        return x.clone()
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), bias, padding=1, groups=x.shape[3]).permute(0, 2, 3, 1)
    y = y + x if residual else y
    return (F.silu(y) if silu else y).contiguous()


@torch.library.custom_op("ssmamba::depthwise3x3", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, residual: bool) -> Tensor:
    _check(x, weight, bias)
    if x.numel() and is_served_by_c(x):
        from ssmamba_models.ops.cpu import rows

        return rows.depthwise3x3(x, weight, bias, silu, residual)
    return _by_torch(x, weight, bias, silu, residual)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, residual: bool) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "ssmamba::depthwise3x3_backward", mutates_args=(), schema=f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)"
)
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, residual: bool
) -> tuple[Tensor, ...]:
    _check(x, weight, bias)
    checks.expect_gradient(OP, grad, x)
    inputs = (x, weight, bias)
    if x.numel() == 0:
        return zeros_like_inputs(inputs)
    if is_served_by_c(x):
        from ssmamba_models.ops.cpu import rows

        return like_inputs(inputs, rows.depthwise3x3_backward(grad, x, weight, bias, silu, residual))
    return like_inputs(inputs, [x.new_empty(0) if g is None else g for g in _vjp(grad, *inputs, silu, residual)])


def _vjp(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, residual: bool
) -> tuple[Tensor | None, ...]:
    given = [t for t in (x, weight, bias) if t is not None]
    function = lambda x, weight, bias=None: _by_torch(x, weight, bias, silu, residual)  # noqa: E731
    return (*pulled_back(function, given, grad), None)[:3]


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, residual: bool
) -> tuple[Tensor, ...]:
    return zeros_like_inputs((x, weight, bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu, ctx.residual = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.ssmamba.depthwise3x3_backward(grad, *saved, ctx.silu, ctx.residual)
    return (*(None if x is None else g for x, g in zip(saved, grads)), None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, residual: bool) -> Tensor:
    _check(x, weight, bias)
    return _by_torch(x, weight, bias, silu, residual)


def _backward_formula(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _check(*arguments[:3])
    checks.expect_gradient(OP, grad, arguments[0])
    return tuple(grad.new_empty(0) if g is None else g for g in _vjp(grad, *arguments))


register_formula(_forward, _formula)
register_formula(_backward, _backward_formula)


@register_flop_formula(torch.ops.ssmamba.depthwise3x3)
def depthwise3x3_flops(x_shape: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two for each of the nine weights, as torch counts a convolution."""
    return 18 * math.prod(x_shape)


@register_flop_formula(torch.ops.ssmamba.depthwise3x3_backward)
def depthwise3x3_backward_flops(
    grad_shape: tuple[int, ...], x_shape: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """As many for the gradient of x, and for that of the weight."""
    return 2 * depthwise3x3_flops(x_shape)
