"""causal_conv1d: the short depthwise convolution of 1-D Mamba blocks, as a function and as a torch operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmamba_models.ops import checks, vectorized
from ssmamba_models.ops.derivatives import register_formula
from ssmamba_models.ops.dispatch import select
from ssmamba_models.ops.gradients import like_inputs, zeros_like_inputs

OP = "causal_conv1d"
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu"


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Depthwise convolution along time that sees the present and the past only.

    ``y[b, d, t] = act(bias[d] + sum_j weight[d, j] x[b, d, t - (W - 1) + j])``, with zeros before the first step:
    layout and meaning of causal-conv1d's `causal_conv1d_fn`; of its further arguments (initial and final states,
    seq_idx) there is none here, so give `activation` by keyword.

    Args:
        x: (B, D, L), float32, bfloat16, float16 or float64.
        weight: (D, W), W from 2 to 4.
        bias: (D,) or None.
        activation: None, "silu" or its other name "swish".

    Returns:
        y (B, D, L), dtype of x.

    Raises:
        TypeError: an argument is no tensor or has a non-floating dtype.
        ValueError: a shape, device or activation does not fit, or SSMAMBA_BACKEND forces a backend that cannot run.

    Source: Gu and Dao, Mamba (arXiv:2312.00752), section 3.4.
    """
    checks.expect_tensors(OP, x=x, weight=weight, bias=bias)
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'{OP}: activation is {activation!r}, expected None, "silu" or "swish"')
    (x,) = checks.activations(OP, x)
    weight, bias = checks.parameters(x, weight, bias)
    return torch.ops.ssmamba.causal_conv1d(x, weight, bias, activation is not None)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Run by the operator itself: scripted and exported models call it without the public function."""
    checks.expect_tensors(OP, x=x, weight=weight, bias=bias)
    checks.expect_dims(OP, "x", x, "B, D, L")
    checks.expect_dims(OP, "weight", weight, "D, W")
    if not 2 <= weight.shape[1] <= 4:
        raise ValueError(f"{OP}: weight has shape {tuple(weight.shape)}, expected (D, W) with W = 2, 3 or 4")
    checks.expect_shape(OP, "weight", weight, "D, W", (x.shape[1], weight.shape[1]))
    checks.expect_shape(OP, "bias", bias, "D,", (x.shape[1],))
    checks.expect_operator_dtypes(OP, (x,), (weight, bias))


@torch.library.custom_op("ssmamba::causal_conv1d", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    _check(x, weight, bias)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    return select(OP, x).causal_conv1d(x, weight, bias, silu)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "ssmamba::causal_conv1d_backward", mutates_args=(), schema=f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)"
)
def _backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, ...]:
    _check(x, weight, bias)
    checks.expect_gradient(OP, grad, x)
    inputs = (x, weight, bias)
    if x.numel() == 0:
        return zeros_like_inputs(inputs)
    return like_inputs(inputs, select(OP, x).causal_conv1d_backward(grad, x, weight, bias, silu))


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, ...]:
    return zeros_like_inputs((x, weight, bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.ssmamba.causal_conv1d_backward(grad, *saved, ctx.silu)
    return (*(None if x is None else g for x, g in zip(saved, grads)), None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _formula(*inputs: Any) -> Tensor:
    _check(*inputs[:-1])
    return vectorized.causal_conv1d(*inputs)


def _backward_formula(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    _check(*inputs[:-1])
    checks.expect_gradient(OP, grad, inputs[0])
    return like_inputs(inputs[:-1], vectorized.causal_conv1d_backward(grad, *inputs))


register_formula(_forward, _formula)
register_formula(_backward, _backward_formula)


@register_flop_formula(torch.ops.ssmamba.causal_conv1d)
def causal_conv1d_flops(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    bias_shape: tuple[int, ...],
    silu: bool,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Floating point operations of one forward pass."""
    batch, channels, length = x_shape
    return batch * channels * length * (2 * weight_shape[1] + (4 if silu else 0))


@register_flop_formula(torch.ops.ssmamba.causal_conv1d_backward)
def causal_conv1d_backward_flops(
    grad_shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    bias_shape: tuple[int, ...],
    silu: bool,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Floating point operations of one backward pass."""
    return 2 * causal_conv1d_flops(x_shape, weight_shape, bias_shape, silu)
