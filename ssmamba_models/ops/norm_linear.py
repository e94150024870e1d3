"""norm_linear: LayerNorm and a linear layer as one operator, with the residual that the result is added to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmamba_models.ops import checks
from ssmamba_models.ops.gradients import like_inputs, zeros_like_inputs
from ssmamba_models.ops.rowwise import layer_norm, layer_norm_backward, piece_rows

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


@torch.library.custom_op("ssmamba::norm_linear", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float, residual: Tensor | None, scale: float
) -> Tensor:
    _check(x, norm_weight, norm_bias, weight, residual)
    outputs, channels = weight.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    tokens, results = x.reshape(-1, channels).contiguous(), y.view(-1, outputs)
    base = None if residual is None else residual.reshape(-1, outputs)
    norm_weight, norm_bias = norm_weight.contiguous(), norm_bias.contiguous()
    transposed = weight.to(x.dtype).t() if residual is not None or scale == 1.0 else (scale * weight).to(x.dtype).t()
    length = piece_rows(max(channels, outputs))
    normed = x.new_empty((min(length, len(tokens)), channels))
    for first in range(0, len(tokens), length):
        piece = slice(first, first + length)
        n = layer_norm(tokens[piece], norm_weight, norm_bias, eps, normed[: len(tokens[piece])])
        if base is None:
            torch.mm(n, transposed, out=results[piece])
        else:
            torch.addmm(base[piece], n, transposed, alpha=scale, out=results[piece])
    return y


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
    outputs, channels = weight.shape
    tokens, grads = x.reshape(-1, channels).contiguous(), grad.reshape(-1, outputs)
    norm_weight, norm_bias = norm_weight.contiguous(), norm_bias.contiguous()
    dx = torch.empty_like(tokens)
    dparameters = [torch.zeros_like(t) for t in (norm_weight, norm_bias)]
    dweight = empty_sum(weight, tokens)
    scaled = (scale * weight).to(x.dtype)
    length = piece_rows(max(channels, outputs))
    normed = x.new_empty((min(length, len(tokens)), channels))
    for first in range(0, len(tokens), length):
        piece = slice(first, first + length)
        x_piece, g, dx_piece = tokens[piece], grads[piece], dx[piece]
        n = layer_norm(x_piece, norm_weight, norm_bias, eps, normed[: len(g)])
        add_product(dweight, g.t(), n, scale, first=first == 0)
        torch.mm(g, scaled, out=dx_piece)
        for total, part in zip(dparameters, layer_norm_backward(dx_piece, x_piece, norm_weight, eps, None, dx_piece)):
            total += part
    grads_of = (dx.view(x.shape), *dparameters, dweight)
    return like_inputs((x, norm_weight, norm_bias, weight), grads_of)  # type: ignore[return-value]


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
