"""causal_conv1d on the kernels of conv1d.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmamba_models.ops.alignment import aligned, all_aligned
from ssmamba_models.ops.triton.conv1d import conv_backward_kernel, conv_kernel
from ssmamba_models.ops.triton.launch import launch

CHANNELS, STEPS = 4, 256


def _tiles(length: int) -> tuple[int, int]:
    """Channels and steps of a tile: 1024 values, eight to a thread."""
    steps = STEPS
    while steps > 16 and steps >= 2 * length:
        steps //= 2
    return CHANNELS * STEPS // steps, steps


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Programs, arguments and constants of either kernel."""
    x, weight, bias = all_aligned(x, weight, bias)
    batch, channels, length = x.shape
    block, steps = _tiles(length)
    programs = batch * -(-channels // block) * -(-length // steps)
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "x_batch": x.stride(0),
        "x_channel": x.stride(1),
        "x_step": x.stride(2),
        "channels": channels,
        "length": length,
    }
    return programs, arguments, {"W": weight.shape[1], "SILU": silu, "DB": block, "LB": steps}


def causal_conv1d(x, weight, bias, silu) -> Tensor:
    """See :func:`ssmamba_models.ops.causal_conv1d`."""
    programs, arguments, constants = _arguments(x, weight, bias, silu)
    y = x.new_empty(x.shape)
    launch(conv_kernel, programs, {**arguments, "y_ptr": y}, constants)
    return y


def causal_conv1d_backward(grad, x, weight, bias, silu) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, the latter two in float32."""
    programs, arguments, constants = _arguments(x, weight, bias, silu)
    parts = x.shape[0] * -(-x.shape[2] // constants["LB"])
    dx = x.new_empty(x.shape)
    dweight, dbias = weight.new_empty(parts, *weight.shape), weight.new_empty(parts, weight.shape[0])
    outputs = {"grad_ptr": aligned(grad.contiguous()), "dx_ptr": dx, "dweight_ptr": dweight, "dbias_ptr": dbias}
    launch(conv_backward_kernel, programs, {**arguments, **outputs}, constants)
    return dx, dweight.sum(0), dbias.sum(0)
