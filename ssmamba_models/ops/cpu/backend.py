"""The operators on the C kernels: from tensors to the argument structs of the C files beside.

The structs here and there must agree field by field.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ssmamba_models.ops.alignment import aligned
from ssmamba_models.ops.cpu import library
from ssmamba_models.ops.cpu.threads import run_tasks

LANES = 16
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

i64, ptr = ctypes.c_int64, ctypes.c_void_p


def why_missing(device: torch.device | None = None) -> tuple[str, str]:
    """("", "") if the kernels can be used, else the reason and the cure."""
    _, reason = library.open_library()
    return (reason, library.CURE) if reason else ("", "")


def unsupported(op: str, dtype: torch.dtype, states: int) -> str:
    """Why these arguments cannot be served, or ""."""
    if dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return ""


class View(ctypes.Structure):
    """A tensor that is read in place: its address and its strides, in elements."""

    _fields_ = (("data", ptr), ("batch", i64), ("pixel", i64))


class DirectionalArgs(ctypes.Structure):
    """The struct of that name in directional.c."""

    _fields_ = (
        *((name, i64) for name in ("batch", "height", "width", "channels", "states", "dtype")),
        *((name, View) for name in ("u", "delta", "B", "C", "grad")),
        *((name, ptr) for name in ("A", "D", "bias", "hold", "y", "du", "ddelta", "dA", "dD", "dbias", "dB", "dC")),
    )


class SelectiveArgs(ctypes.Structure):
    """The struct of that name in selective.c."""

    _fields_ = (
        *((name, i64) for name in ("batch", "channels", "length", "states", "groups", "dtype", "softplus")),
        *((name, ptr) for name in ("u", "delta", "z", "grad", "A", "B", "C", "D", "bias", "grad_state", "y", "state")),
        *((name, ptr) for name in ("du", "ddelta", "dz", "dA", "dD", "dbias", "dB", "dC")),
    )


class ConvArgs(ctypes.Structure):
    """The struct of that name in conv1d.c."""

    _fields_ = (
        *((name, i64) for name in ("batch", "channels", "length", "taps", "dtype", "silu")),
        *((name, ptr) for name in ("x", "grad", "weight", "bias", "y", "dx", "dweight", "dbias")),
    )


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _dense(x: Tensor) -> Tensor:
    """x itself if its elements lie side by side and where C may read them, else a copy."""
    return aligned(x.contiguous())


def _float(x: Tensor | None) -> Any:
    return None if x is None else _dense(x.float())


def _output(x: Tensor) -> Tensor:
    """Room for a result like x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _buffer(*shape: int) -> Tensor:
    """Room for what the kernels write as float32, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _pixelwise(x: Tensor) -> Tensor:
    """x (B, H, W, ...) itself if all its pixels lie at one stride and each pixel's values side by side, else a copy."""
    inner = 1
    for size, stride in zip(reversed(x.shape[3:]), reversed(x.stride()[3:])):
        if size > 1 and stride != inner:
            return _dense(x)
        inner *= size
    height, width = x.shape[1:3]
    if height > 1 and width > 1 and x.stride(1) != width * x.stride(2):
        return _dense(x)
    return aligned(x)


def _pixel_stride(x: Tensor) -> int:
    # The stride of a dimension of size one means nothing, and contiguous() leaves it as it is.
    return x.stride(2) if x.shape[2] > 1 else x.stride(1)


def _view(x: Tensor) -> View:
    return View(x.data_ptr(), x.stride(0), _pixel_stride(x))


def _call(function: str, args: ctypes.Structure, tasks: int, cost: float) -> None:
    handle, reason = library.open_library()
    if handle is None:
        raise RuntimeError(f"{reason}; {library.CURE}")
    run_tasks(handle, function, ctypes.addressof(args), tasks, cost)


# ---- directional_scan ----


def _directional(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    hold: Tensor | None,
) -> tuple[DirectionalArgs, list[Tensor | None]]:
    """The argument struct with its inputs filled in, and the tensors that must outlive it."""
    batch, height, width, channels = u.shape
    u, delta = _pixelwise(u), _pixelwise(delta)
    B, C = _pixelwise(B.float()), _pixelwise(C.float())
    if _pixel_stride(B) != _pixel_stride(C):  # one pixel stride serves both
        B, C = _dense(B), _dense(C)
    A, D, bias = _float(A), _float(D), _float(delta_bias)
    hold = None if hold is None else hold.contiguous()
    args = DirectionalArgs(batch, height, width, channels, A.shape[2], DTYPES[u.dtype])
    args.u, args.delta, args.B, args.C = _view(u), _view(delta), _view(B), _view(C)
    args.A, args.D, args.bias, args.hold = _address(A), _address(D), _address(bias), _address(hold)
    return args, [u, delta, B, C, A, D, bias, hold]


def directional_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    hold: Tensor | None,
) -> Tensor:
    """See :func:`ssmamba_models.ops.directional_scan`."""
    args, keep = _directional(u, delta, A, B, C, D, delta_bias, hold)
    y = _output(u)
    args.y = y.data_ptr()
    _call("ssmamba_directional_forward", args, args.batch * -(-args.channels // LANES), 4.0 * u.numel() * args.states)
    del keep
    return y


def directional_scan_backward(
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
    """Gradients of u, delta, A, B, C, D and delta_bias; those of A, D, delta_bias, B and C in float32."""
    args, keep = _directional(u, delta, A, B, C, D, delta_bias, hold)
    grad = _pixelwise(grad)
    args.grad = _view(grad)
    batch, height, width, channels, states = args.batch, args.height, args.width, args.channels, args.states
    blocks = -(-channels // LANES)
    du, ddelta = (_output(u) for _ in range(2))
    dA, dD = _buffer(batch, 4, channels, states), _buffer(batch, channels)
    dbias = _buffer(batch, 4, channels)
    dB, dC = (_buffer(blocks, batch, height, width, 4, states) for _ in range(2))
    for name, x in zip(("du", "ddelta", "dA", "dD", "dbias", "dB", "dC"), (du, ddelta, dA, dD, dbias, dB, dC)):
        setattr(args, name, x.data_ptr())
    _call("ssmamba_directional_backward", args, batch * blocks, 12.0 * u.numel() * states)
    del keep
    return du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dbias.sum(0)


# ---- selective_scan ----


def _selective(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[SelectiveArgs, list[Tensor | None]]:
    batch, channels, length = u.shape
    u, delta = _dense(u), _dense(delta)
    z = None if z is None else _dense(z)
    A, B, C, D, bias = (_float(x) for x in (A, B, C, D, delta_bias))
    args = SelectiveArgs(batch, channels, length, A.shape[1], B.shape[1], DTYPES[u.dtype], int(delta_softplus))
    for name, x in zip(("u", "delta", "z", "A", "B", "C", "D", "bias"), (u, delta, z, A, B, C, D, bias)):
        setattr(args, name, _address(x))
    return args, [u, delta, z, A, B, C, D, bias]


def _selective_blocks(args: SelectiveArgs) -> int:
    return -(-(args.channels // args.groups) // LANES)


def selective_scan(
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
    """See :func:`ssmamba_models.ops.selective_scan`; y and the last state (float32)."""
    args, keep = _selective(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    y, state = _output(u), _buffer(args.batch, args.channels, args.states)
    args.y, args.state = y.data_ptr(), state.data_ptr()
    tasks = args.batch * args.groups * _selective_blocks(args)
    _call("ssmamba_selective_forward", args, tasks, 1.0 * u.numel() * args.states)
    del keep
    return y, state


def selective_scan_backward(
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
    """Gradients of u, delta, A, B, C, D, z and delta_bias; those of A, B, C, D and delta_bias in float32."""
    args, keep = _selective(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    grad, grad_state = _dense(grad), _float(grad_state)
    args.grad, args.grad_state = grad.data_ptr(), _address(grad_state)
    blocks = _selective_blocks(args)
    du, ddelta, dz = (_output(u) for _ in range(3))
    dA = _buffer(args.batch, args.channels, args.states)
    dD, dbias = (_buffer(args.batch, args.channels) for _ in range(2))
    dB, dC = (_buffer(blocks, args.batch, args.groups, args.states, args.length) for _ in range(2))
    names = ("du", "ddelta", "dz", "dA", "dD", "dbias", "dB", "dC")
    for name, x in zip(names, (du, ddelta, dz, dA, dD, dbias, dB, dC)):
        setattr(args, name, x.data_ptr())
    _call("ssmamba_selective_backward", args, args.batch * args.groups * blocks, 3.0 * u.numel() * args.states)
    del keep
    return du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dz, dbias.sum(0)


# ---- causal_conv1d ----


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[ConvArgs, list[Tensor | None]]:
    x, weight, bias = _dense(x), _float(weight), _float(bias)
    args = ConvArgs(*x.shape, weight.shape[1], DTYPES[x.dtype], int(silu))
    args.x, args.weight, args.bias = x.data_ptr(), weight.data_ptr(), _address(bias)
    return args, [x, weight, bias]


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """See :func:`ssmamba_models.ops.causal_conv1d`."""
    args, keep = _conv(x, weight, bias, silu)
    y = _output(x)
    args.y = y.data_ptr()
    _call("ssmamba_conv_forward", args, args.batch * args.channels, 0.3 * x.numel())
    del keep
    return y


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, the latter two in float32."""
    args, keep = _conv(x, weight, bias, silu)
    grad = _dense(grad)
    dx = _output(x)
    dweight, dbias = _buffer(args.batch, args.channels, args.taps), _buffer(args.batch, args.channels)
    args.grad, args.dx, args.dweight, args.dbias = (t.data_ptr() for t in (grad, dx, dweight, dbias))
    _call("ssmamba_conv_backward", args, args.batch * args.channels, 1.0 * x.numel())
    del keep
    return dx, dweight.sum(0), dbias.sum(0)
