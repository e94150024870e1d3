"""norm_linear: LayerNorm and a linear layer as one operator, with the residual that the result is added to."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmamba_models.ops import checks
from ssmamba_models.ops.derivatives import register_formula
from ssmamba_models.ops.gradients import like_inputs, pulled_back, zeros_like_inputs
from ssmamba_models.ops.rowwise import as_rows, kernels, piece_rows

OP = "norm_linear"
_INPUTS = "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, float eps, Tensor? residual, float scale"


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``y = residual + scale * (LayerNorm(x) W^T)``.

    Backward recomputes the norm rather than store its result. The products are torch's; on a CPU the norm and its
    gradient are C kernels that run over pieces of the map. Under autocast x and residual are cast.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        norm_weight, norm_bias: (C,). weight: (N, C).
        eps: of the norm.
        residual: (..., N), dtype of x.
        scale: of what is added to the residual, such as 1 / (1 - rate) of stochastic depth.

    Returns:
        y (..., N), contiguous, dtype of x.

    Raises:
        TypeError: an argument is no tensor, has a non-floating dtype, or dtypes differ.
        ValueError: a shape or device does not fit, or SSMAMBA_BACKEND names no backend.

    Source: LayerNorm: arXiv:1607.06450; pre-norm residual branches: arXiv:2002.04745.

    Example::

        y = norm_linear(torch.randn(2, 7, 7, 64), torch.ones(64), torch.zeros(64), torch.randn(32, 64))  # (2, 7, 7, 32)
    """
    tensors = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight}
    checks.expect_tensors(OP, **tensors, **({} if residual is None else {"residual": residual}))
    x, residual = checks.activations(OP, x, residual=residual)
    norm_weight, norm_bias, weight = checks.parameters(x, norm_weight, norm_bias, weight)
    return torch.ops.ssmamba.norm_linear(x, norm_weight, norm_bias, weight, eps, residual, scale)


def _check(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    tensors = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight}
    checks.expect_tensors(OP, **tensors, **({} if residual is None else {"residual": residual}))
    checks.expect_operator_dtypes(OP, (x, residual), (norm_weight, norm_bias, weight))
    checks.expect_dims(OP, "weight", weight, "N, C")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{OP}: x has shape {tuple(x.shape)}, expected (..., C) with C = {weight.shape[1]}")
    checks.expect_shape(OP, "norm_weight", norm_weight, "C,", (weight.shape[1],))
    checks.expect_shape(OP, "norm_bias", norm_bias, "C,", (weight.shape[1],))
    checks.expect_shape(OP, "residual", residual, "..., N", (*x.shape[:-1], weight.shape[0]))


def compute(
    rows: ModuleType,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    scale: float,
) -> Tensor:
    """The operator on rows, (M, C) -> (M, N), by the kernels of `rows`; all but `weight` contiguous."""
    y = x.new_empty((len(x), len(weight)))
    transposed = (weight if residual is not None or scale == 1.0 else scale * weight).to(x.dtype).t()
    length = piece_rows(max(weight.shape))
    normed = x.new_empty((min(length, len(x)), x.shape[1]))
    for first in range(0, len(x), length):
        piece = slice(first, first + length)
        x_piece, result = x[piece], y[piece]
        n = rows.layer_norm(x_piece, norm_weight, norm_bias, eps, normed[: len(result)])
        if residual is None:
            torch.mm(n, transposed, out=result)
        else:
            torch.addmm(residual[piece], n, transposed, alpha=scale, out=result)
    return y


def compute_gradients(
    rows: ModuleType,
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    eps: float,
    scale: float,
    add: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, plus `add`, and of norm_weight, norm_bias and weight, from `grad` (M, N)."""
    dx, dweight = torch.empty_like(x), empty_sum(weight, x)
    dnorm = [torch.zeros_like(t) for t in (norm_weight, norm_bias)]
    scaled = (weight if scale == 1.0 else scale * weight).to(x.dtype)
    length = piece_rows(max(weight.shape))
    normed = x.new_empty((min(length, len(x)), x.shape[1]))
    for first in range(0, len(x), length):
        piece = slice(first, first + length)
        x_piece, g, n = x[piece], grad[piece], normed[: len(x) - first]
        rows.layer_norm(x_piece, norm_weight, norm_bias, eps, n)
        add_product(dweight, g.t(), n, scale, first=first == 0)
        torch.mm(g, scaled, out=n)
        beside = None if add is None else add[piece]
        for total, part in zip(dnorm, rows.layer_norm_backward(n, x_piece, norm_weight, eps, beside, dx[piece])):
            total += part
    return dx, dnorm[0], dnorm[1], dweight


@torch.library.custom_op("ssmamba::norm_linear", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float, residual: Tensor | None, scale: float
) -> Tensor:
    _check(x, norm_weight, norm_bias, weight, residual)
    outputs, channels = weight.shape
    base = None if residual is None else residual.reshape(-1, outputs)
    norm_weight, norm_bias = (as_rows(t, channels)[0] for t in (norm_weight, norm_bias))
    y = compute(kernels(x), as_rows(x, channels), norm_weight, norm_bias, weight, eps, base, scale)
    return y.view(*x.shape[:-1], outputs)


@_forward.register_fake
def _(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float, residual: Tensor | None, scale: float
) -> Tensor:
    _check(x, norm_weight, norm_bias, weight, residual)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("ssmamba::norm_linear_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, norm_weight, norm_bias, weight, grad)
    inputs, (outputs, channels) = (x, norm_weight, norm_bias, weight), weight.shape
    norm_weight, norm_bias = (as_rows(t, channels)[0] for t in (norm_weight, norm_bias))
    grads, tokens = grad.reshape(-1, outputs), as_rows(x, channels)
    dx, *others = compute_gradients(kernels(x), grads, tokens, norm_weight, norm_bias, weight, eps, scale)
    return like_inputs(inputs, (dx.view(x.shape), *others))  # type: ignore[return-value]


def empty_sum(like: Tensor, rows: Tensor) -> Tensor:
    """Room for what `add_product` sums over pieces of `rows`; zeros where there is none."""
    return torch.empty_like(like) if len(rows) else torch.zeros_like(like)


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, first: bool = False) -> None:
    """total += scale * a b, or with `first` = scale * a b, in total's precision whatever that of a and b."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0.0 if first else 1.0, alpha=scale, out=total)
    elif first:
        torch.mul(torch.mm(a, b), scale, out=total)
    else:
        total.add_(torch.mm(a, b), alpha=scale)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float, scale: float
) -> tuple[Tensor, ...]:
    return zeros_like_inputs((x, norm_weight, norm_bias, weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, residual, ctx.scale = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.ssmamba.norm_linear_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.scale)
    return (*grads, None, grad if ctx.has_residual else None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _formula(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float, residual: Tensor | None, scale: float
) -> Tensor:
    _check(x, norm_weight, norm_bias, weight, residual)
    normed = F.layer_norm(x.to(weight.dtype), norm_weight.shape, norm_weight, norm_bias, eps)
    y = scale * F.linear(normed, weight).to(x.dtype)
    return y if residual is None else residual + y


def _backward_formula(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float, scale: float
) -> tuple[Tensor, ...]:
    tensors = (x, norm_weight, norm_bias, weight)
    return pulled_back(lambda x, a, b, w: _formula(x, a, b, w, eps, None, scale), tensors, grad)


register_formula(_forward, _formula)
register_formula(_backward, _backward_formula)


@register_flop_formula(torch.ops.ssmamba.norm_linear)
def norm_linear_flops(
    x_shape: tuple[int, ...],
    norm_weight_shape: tuple[int, ...],
    norm_bias_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Those of the product."""
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.ssmamba.norm_linear_backward)
def norm_linear_backward_flops(grad_shape: tuple[int, ...], *shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Those of two products."""
    return 2 * norm_linear_flops(*shapes)
