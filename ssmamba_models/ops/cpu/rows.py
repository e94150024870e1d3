"""The C kernels of a block's training: depthwise convolution, LayerNorm and GELU, each with its gradient.

The structs here and in the C files must agree field by field.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssmamba_models.ops.cpu.backend import DTYPES, LANES, _address, _buffer, _call, _dense, _float, _output, i64, ptr

BLOCK = 32  # rows of a task: their partial sums are few, and there are enough tasks for all threads
LARGEST_GROUP = 4 * LANES


class DepthwiseArgs(ctypes.Structure):
    """The struct of that name in depthwise.c."""

    _fields_ = (
        *((name, i64) for name in ("batch", "height", "width", "channels", "group", "dtype", "silu", "residual")),
        *((name, ptr) for name in ("x", "weight", "bias", "grad", "y", "dx", "dweight", "dbias")),
    )


class NormArgs(ctypes.Structure):
    """The struct of that name in layer_norm.c."""

    _fields_ = (
        *((name, i64) for name in ("rows", "width", "block", "dtype")),
        ("eps", ctypes.c_float),
        *((name, ptr) for name in ("x", "weight", "bias", "y", "grad", "add", "dx", "dweight", "dbias")),
    )


class GeluArgs(ctypes.Structure):
    """The struct of that name in gelu.c."""

    _fields_ = (
        *((name, i64) for name in ("rows", "width", "block", "dtype")),
        ("scale", ctypes.c_float),
        *((name, ptr) for name in ("x", "bias", "y", "grad", "dbias")),
    )


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, residual: bool
) -> tuple[DepthwiseArgs, int, list[Tensor | None]]:
    """The struct with its inputs filled in, the number of tasks, and the tensors that must outlive it."""
    x, weight, bias = _dense(x), _float(weight), _float(bias)
    batch, channels = x.shape[0], x.shape[3]
    # Wide groups read memory in longer runs; narrow ones make enough tasks of a small batch for all threads. No sum
    # runs across channels, so results do not depend on it.
    wide = (g for g in (LARGEST_GROUP, 2 * LANES) if batch * (channels // g) >= 2 * torch.get_num_threads())
    group = next(wide, LANES)
    args = DepthwiseArgs(*x.shape, group, DTYPES[x.dtype], silu, residual)
    args.x, args.weight, args.bias = x.data_ptr(), weight.data_ptr(), _address(bias)
    return args, batch * -(-channels // group), [x, weight, bias]


def depthwise3x3(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, residual: bool) -> Tensor:
    """See :func:`ssmamba_models.ops.depthwise.depthwise3x3`."""
    args, tasks, keep = _depthwise(x, weight, bias, silu, residual)
    y = _output(x)
    args.y = y.data_ptr()
    _call("ssmamba_depthwise_forward", args, tasks, 2.0 * x.numel())
    del keep
    return y


def depthwise3x3_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, the latter two in float32."""
    args, tasks, keep = _depthwise(x, weight, bias, silu, residual)
    grad, dx = _dense(grad), _output(x)
    dweight, dbias = _buffer(args.batch, args.channels, 9), _buffer(args.batch, args.channels)
    args.grad, args.dx, args.dweight, args.dbias = (t.data_ptr() for t in (grad, dx, dweight, dbias))
    _call("ssmamba_depthwise_backward", args, tasks, 6.0 * x.numel())
    del keep
    return dx, dweight.sum(0).view(weight.shape), dbias.sum(0)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> Tensor:
    """LayerNorm of x (M, C), written to `out`; both contiguous. weight and bias (C,) are float32, contiguous."""
    args = NormArgs(*x.shape, BLOCK, DTYPES[x.dtype], eps, *(t.data_ptr() for t in (x, weight, bias, out)))
    _call("ssmamba_norm_forward", args, -(-args.rows // BLOCK), 2.0 * x.numel())
    return out


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, add: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of x, plus `add`, to `out`; return those of weight and bias. All (M, C), contiguous."""
    blocks = -(-x.shape[0] // BLOCK)
    sums = _buffer(2, blocks, x.shape[1])
    args = NormArgs(*x.shape, BLOCK, DTYPES[x.dtype], eps, x.data_ptr(), weight.data_ptr())
    args.grad, args.add, args.dx = grad.data_ptr(), _address(add), out.data_ptr()
    args.dweight, args.dbias = sums[0].data_ptr(), sums[1].data_ptr()
    _call("ssmamba_norm_backward", args, blocks, 4.0 * x.numel())
    dweight, dbias = sums.sum(1)
    return dweight, dbias


def bias_gelu(x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """gelu(x + bias), written to `out`; x (M, N), contiguous; bias (N,) float32."""
    args = GeluArgs(*x.shape, BLOCK, DTYPES[x.dtype], 1.0, x.data_ptr(), bias.data_ptr(), out.data_ptr())
    _call("ssmamba_gelu_forward", args, -(-args.rows // BLOCK), 2.0 * x.numel())
    return out


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, scale: float, out: Tensor) -> Tensor:
    """Turn `grad` into scale times the gradient of x, write gelu(x + bias) to `out`, and return the bias's gradient."""
    blocks = -(-x.shape[0] // BLOCK)
    sums = _buffer(blocks, x.shape[1])
    args = GeluArgs(*x.shape, BLOCK, DTYPES[x.dtype], scale)
    args.x, args.bias, args.y, args.grad, args.dbias = (t.data_ptr() for t in (x, bias, out, grad, sums))
    _call("ssmamba_gelu_backward", args, blocks, 4.0 * x.numel())
    return sums.sum(0)
