"""A depthwise 3x3 convolution over its own input, with what follows it in a block, for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmamba_models.ops import checks, dispatch
from ssmamba_models.ops.derivatives import register_formula


def depthwise3x3_(x: Tensor, weight: Tensor, bias: Tensor, silu: bool = False, residual: bool = False) -> Tensor:
    """Each channel of a map convolved with its own kernel, zeros around the map; written over `x`, without gradients.

    ``y = conv(x) + bias``, with `residual` ``+ x``, then with `silu` ``SiLU(y)``. On a CPU in float32 one pass of the
    C kernel, which needs no second map; elsewhere, and where SSMAMBA_BACKEND asks for another backend, torch's own.

    Args:
        x: (B, H, W, C), contiguous.
        weight: (C, 1, 3, 3). bias: (C,). Both of the dtype and device of x.
        silu: apply SiLU.
        residual: add x.

    Returns:
        `x`.

    Raises:
        RuntimeError: gradients are enabled. Tangents of forward mode are computed, by torch.
        TypeError: an argument is no dense floating tensor.
        ValueError: another shape, dtype or device, an `x` that is not contiguous, or SSMAMBA_BACKEND names no backend.

    Source: with `residual` the local perception unit of CMT (arXiv:2107.06263, eq. 2); with `silu` what stands before
    the scan in VMamba (arXiv:2401.10166).
    """
    if torch.is_grad_enabled():
        raise RuntimeError("depthwise3x3_ overwrites its input and has no gradient: call it under torch.no_grad()")
    torch.ops.ssmamba.depthwise3x3_(x, weight, bias, silu, residual)
    return x


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Run by the operator itself, for those who call it without the public function."""
    checks.expect_tensors("depthwise3x3_", x=x, weight=weight, bias=bias)
    fits = x.ndim == 4 and weight.shape == (x.shape[-1], 1, 3, 3) and bias.shape == x.shape[-1:]
    if not fits or any(t.dtype != x.dtype or t.device != x.device for t in (weight, bias)):
        given = ", ".join(f"{n} is {tuple(t.shape)} {t.dtype} on {t.device}" for n, t in _named(x, weight, bias))
        raise ValueError(f"depthwise3x3_: {given}; expected (B, H, W, C), (C, 1, 3, 3), (C,) of one dtype and device")
    if not x.is_contiguous():
        raise ValueError("depthwise3x3_: x is not contiguous; call x.contiguous() first")


def _named(x: Tensor, weight: Tensor, bias: Tensor) -> list[tuple[str, Tensor]]:
    return [("x", x), ("weight", weight), ("bias", bias)]


# Registered, so that tracers and dispatch modes see it.
@torch.library.custom_op("ssmamba::depthwise3x3_", mutates_args=("x",))
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, residual: bool) -> None:
    _check(x, weight, bias)
    if x.device.type == "cpu" and x.dtype == torch.float32 and dispatch.is_served_by("c", x.device.type):
        from ssmamba_models.ops.cpu import backend

        backend.depthwise3x3_(x, weight, bias, silu, residual)
    else:
        x.copy_(_by_torch(x, weight, bias, silu, residual))


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, residual: bool) -> Tensor:
    if x.numel() == 0:  # torch's convolution refuses maps without pixels
        return x
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1)
    y = y + x if residual else y
    return F.silu(y) if silu else y


@_depthwise.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, residual: bool) -> None:
    _check(x, weight, bias)


def _formula(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, residual: bool) -> None:
    _check(x, weight, bias)
    x.copy_(_by_torch(x.clone(), weight, bias, silu, residual))  # the weight's gradient needs x as it was


register_formula(_depthwise, _formula)


@register_flop_formula(torch.ops.ssmamba.depthwise3x3_)
def _flops(x_shape: tuple[int, ...], *args: object, out_shape: object = None, **kwargs: object) -> int:
    """Two for each of the nine weights, as torch counts a convolution."""
    flops = 18
    for size in x_shape:
        flops *= size
    return flops
