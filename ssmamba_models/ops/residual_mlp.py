"""residual_mlp: a pre-norm MLP and its residual as one operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmamba_models.ops import checks
from ssmamba_models.ops.gradients import like_inputs, zeros_like_inputs
from ssmamba_models.ops.norm_linear import add_product, empty_sum
from ssmamba_models.ops.rowwise import bias_gelu, bias_gelu_backward, layer_norm, layer_norm_backward, piece_rows

OP = "residual_mlp"
_PARAMETERS = ("norm_weight", "norm_bias", "weight1", "bias1", "weight2", "bias2")


def residual_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float = 1e-6,
    scale: float = 1.0,
) -> Tensor:
    """``y = x + scale * (GELU(LayerNorm(x) W1^T + b1) W2^T + b2)``, with exact GELU.

    Of its activations the first product's result alone is kept for backward, which recomputes norm and GELU. The
    products are torch's; on a CPU all else are C kernels, and both directions run over pieces of the map that stay in
    the caches. Under autocast x is cast.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        norm_weight, norm_bias: (C,). weight1: (N, C). bias1: (N,). weight2: (C, N). bias2: (C,).
        eps: of the norm.
        scale: of what is added to x, such as 1 / (1 - rate) of stochastic depth.

    Returns:
        y (..., C), contiguous, dtype of x.

    Raises:
        TypeError: an argument is no tensor or has a non-floating dtype.
        ValueError: a shape or device does not fit, or SSMAMBA_BACKEND names no backend.

    Source: LayerNorm: arXiv:1607.06450; GELU: arXiv:1606.08415, sec. 2; pre-norm branches: arXiv:2002.04745.

    Example::

        from torch import ones, randn, zeros

        y = residual_mlp(randn(9, 8), ones(8), zeros(8), randn(32, 8), zeros(32), randn(8, 32), zeros(8))  # (9, 8)
    """
    parameters = (norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    checks.expect_tensors(OP, x=x, **dict(zip(_PARAMETERS, parameters)))
    (x,) = checks.activations(OP, x)
    # The hidden map is kept for a backward pass alone.
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    return torch.ops.ssmamba.residual_mlp(x, *checks.parameters(x, *parameters), eps, scale, keep)[0]


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> None:
    parameters = (norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    checks.expect_tensors(OP, x=x, **dict(zip(_PARAMETERS, parameters)))
    checks.expect_operator_dtypes(OP, (x,), parameters)
    checks.expect_dims(OP, "weight1", weight1, "N, C")
    hidden, channels = weight1.shape
    if x.dim() < 1 or x.shape[-1] != channels:
        raise ValueError(f"{OP}: x has shape {tuple(x.shape)}, expected (..., C) with C = {channels}")
    checks.expect_shape(OP, "norm_weight", norm_weight, "C,", (channels,))
    checks.expect_shape(OP, "norm_bias", norm_bias, "C,", (channels,))
    checks.expect_shape(OP, "bias1", bias1, "N,", (hidden,))
    checks.expect_shape(OP, "weight2", weight2, "C, N", (channels, hidden))
    checks.expect_shape(OP, "bias2", bias2, "C,", (channels,))


@torch.library.custom_op("ssmamba::residual_mlp", mutates_args=())
def _forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    hidden, channels = weight1.shape
    y = x.new_empty(x.shape)
    tokens, results = x.reshape(-1, channels).contiguous(), y.view(-1, channels)
    norm_weight, norm_bias, bias1 = (t.contiguous() for t in (norm_weight, norm_bias, bias1))
    into, back = weight1.to(x.dtype).t(), weight2.to(x.dtype).t()
    length = piece_rows(hidden)
    most = min(length, len(tokens))
    kept = x.new_empty((len(tokens) if keep else 0, hidden))
    normed, active = x.new_empty((most, channels)), x.new_empty((most, hidden))
    for first in range(0, len(tokens), length):
        piece = slice(first, first + length)
        rows = len(tokens[piece])
        n = layer_norm(tokens[piece], norm_weight, norm_bias, eps, normed[:rows])
        a = active[:rows]
        h = torch.mm(n, into, out=kept[piece] if keep else a)
        bias_gelu(h, bias1, a)
        torch.add(tokens[piece], (scale * bias2).to(x.dtype), out=results[piece])
        results[piece].addmm_(a, back, alpha=scale)
    return y, kept


@_forward.register_fake
def _(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    rows = math.prod(x.shape[:-1]) if keep else 0
    return x.new_empty(x.shape), x.new_empty((rows, weight1.shape[0]))


@torch.library.custom_op("ssmamba::residual_mlp_backward", mutates_args=())
def _backward(
    grad: Tensor,
    kept: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    checks.expect_gradient(OP, grad, x)
    hidden, channels = weight1.shape
    tokens, grads = (t.reshape(-1, channels).contiguous() for t in (x, grad))
    inputs = (x, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    norm_weight, norm_bias, bias1 = (t.contiguous() for t in (norm_weight, norm_bias, bias1))
    into, back = weight1.to(x.dtype), weight2.to(x.dtype)
    dx = torch.empty_like(tokens)
    dnorm, dnorm_bias, dbias1, dbias2 = (torch.zeros_like(t) for t in (norm_weight, norm_bias, bias1, bias2))
    dweight1, dweight2 = (empty_sum(t, tokens) for t in (weight1, weight2))
    length = piece_rows(hidden)
    most = min(length, len(tokens))
    normed, active, slopes = (x.new_empty((most, width)) for width in (channels, hidden, hidden))
    for first in range(0, len(tokens), length):
        piece = slice(first, first + length)
        x_piece, g, dx_piece = tokens[piece], grads[piece], dx[piece]
        rows = len(g)
        a, n = active[:rows], normed[:rows]
        dh = torch.mm(g, back, out=slopes[:rows])
        dbias1 += bias_gelu_backward(dh, kept[piece], bias1, scale, a)
        add_product(dweight2, g.t(), a, scale, first=first == 0)
        dbias2.add_(g.sum(0, dtype=dbias2.dtype), alpha=scale)
        layer_norm(x_piece, norm_weight, norm_bias, eps, n)
        add_product(dweight1, dh.t(), n, first=first == 0)
        dn = torch.mm(dh, into, out=n)
        part, part_bias = layer_norm_backward(dn, x_piece, norm_weight, eps, g, dx_piece)
        dnorm += part
        dnorm_bias += part_bias
    grads_of = (dx.view(x.shape), dnorm, dnorm_bias, dweight1, dbias1, dweight2, dbias2)
    return like_inputs(inputs, grads_of)  # type: ignore[return-value]


@_backward.register_fake
def _(grad: Tensor, kept: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return zeros_like_inputs((x, *arguments[:6]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, ctx.scale, keep = inputs
    if not keep:
        raise RuntimeError(f"{OP}: the operator was called without `keep`, and has no gradient; call {OP}() instead")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.ssmamba.residual_mlp_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.scale), None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.ssmamba.residual_mlp)
def residual_mlp_flops(
    x_shape: tuple[int, ...],
    norm_weight_shape: tuple[int, ...],
    norm_bias_shape: tuple[int, ...],
    weight1_shape: tuple[int, ...],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Those of two products."""
    return 4 * math.prod(x_shape) * weight1_shape[0]


@register_flop_formula(torch.ops.ssmamba.residual_mlp_backward)
def residual_mlp_backward_flops(
    grad_shape: tuple[int, ...], kept_shape: tuple[int, ...], *shapes: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Those of four products."""
    return 2 * residual_mlp_flops(*shapes)
