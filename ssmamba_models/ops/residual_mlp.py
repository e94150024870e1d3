"""residual_mlp: a pre-norm MLP and its residual as one operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmamba_models.ops import checks
from ssmamba_models.ops.derivatives import register_formula
from ssmamba_models.ops.gradients import like_inputs, pulled_back, zeros_like_inputs
from ssmamba_models.ops.norm_linear import add_product, empty_sum
from ssmamba_models.ops.rowwise import as_rows, kernels, piece_rows

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


def compute(
    rows: ModuleType,
    x: Tensor,
    parameters: Sequence[Tensor],
    eps: float,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The operator on rows (M, C), by the kernels of `rows`, and with `keep` the hidden map (M, N) before its bias.

    All tensors but the weights are contiguous.
    """
    norm_weight, norm_bias, weight1, bias1, weight2, bias2 = parameters
    hidden, length = len(weight1), piece_rows(len(weight1))
    most = min(length, len(x))
    into, back, bias2 = weight1.to(x.dtype).t(), weight2.to(x.dtype).t(), (scale * bias2).to(x.dtype)
    y, kept = torch.empty_like(x), x.new_empty((len(x) if keep else 0, hidden))
    normed, active = x.new_empty((most, x.shape[1])), x.new_empty((most, hidden))
    for first in range(0, len(x), length):
        piece = slice(first, first + length)
        x_piece, result = x[piece], y[piece]
        n, a = normed[: len(result)], active[: len(result)]
        rows.layer_norm(x_piece, norm_weight, norm_bias, eps, n)
        h = torch.mm(n, into, out=kept[piece] if keep else a)
        rows.bias_gelu(h, bias1, a)
        torch.add(x_piece, bias2, out=result)
        result.addmm_(a, back, alpha=scale)
    return y, kept


def compute_gradients(
    rows: ModuleType,
    grad: Tensor,
    kept: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    eps: float,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of x and the parameters, from `grad` (M, C)."""
    norm_weight, norm_bias, weight1, bias1, weight2, bias2 = parameters
    hidden, length = len(weight1), piece_rows(len(weight1))
    most = min(length, len(x))
    into, back, dx = weight1.to(x.dtype), weight2.to(x.dtype), torch.empty_like(x)
    dnorm, dnorm_bias, dbias1 = (torch.zeros_like(t) for t in (norm_weight, norm_bias, bias1))
    dweight1, dweight2 = (empty_sum(t, x) for t in (weight1, weight2))
    normed, active, slopes = (x.new_empty((most, width)) for width in (x.shape[1], hidden, hidden))
    for first in range(0, len(x), length):
        piece = slice(first, first + length)
        x_piece, g = x[piece], grad[piece]
        n, a, dh = normed[: len(g)], active[: len(g)], slopes[: len(g)]
        torch.mm(g, back, out=dh)
        dbias1 += rows.bias_gelu_backward(dh, kept[piece], bias1, scale, a)
        add_product(dweight2, g.t(), a, scale, first=first == 0)
        rows.layer_norm(x_piece, norm_weight, norm_bias, eps, n)
        add_product(dweight1, dh.t(), n, first=first == 0)
        torch.mm(dh, into, out=n)
        part, part_bias = rows.layer_norm_backward(n, x_piece, norm_weight, eps, g, dx[piece])
        dnorm += part
        dnorm_bias += part_bias
    dbias2 = grad.sum(0, dtype=bias2.dtype) * scale
    return dx, dnorm, dnorm_bias, dweight1, dbias1, dweight2, dbias2


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
    channels = weight1.shape[1]
    norm_weight, norm_bias, bias1 = (as_rows(t, len(t))[0] for t in (norm_weight, norm_bias, bias1))
    parameters = (norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    y, kept = compute(kernels(x), as_rows(x, channels), parameters, eps, scale, keep)
    return y.view(x.shape), kept


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
    inputs, channels = (x, norm_weight, norm_bias, weight1, bias1, weight2, bias2), x.shape[-1]
    norm_weight, norm_bias, bias1 = (as_rows(t, len(t))[0] for t in (norm_weight, norm_bias, bias1))
    parameters = (norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    dx, *others = compute_gradients(
        kernels(x), as_rows(grad, channels), kept, as_rows(x, channels), parameters, eps, scale
    )
    return like_inputs(inputs, (dx.view(x.shape), *others))  # type: ignore[return-value]


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


def _value(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    scale: float,
) -> Tensor:
    _check(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    normed = F.layer_norm(x.to(weight1.dtype), norm_weight.shape, norm_weight, norm_bias, eps)
    return x + scale * F.linear(F.gelu(F.linear(normed, weight1, bias1)), weight2, bias2).to(x.dtype)


def _formula(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _value(*arguments[:-1]), arguments[0].new_empty(0)


def _backward_formula(grad: Tensor, kept: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return pulled_back(lambda *tensors: _value(*tensors, *arguments[7:]), arguments[:7], grad)


register_formula(_forward, _formula)
register_formula(_backward, _backward_formula)


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
