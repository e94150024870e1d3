"""GELU fused with the bias before it, that of an MLP's first matrix product or of a norm, for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmamba_models.ops import checks, dispatch
from ssmamba_models.ops.derivatives import register_formula


def bias_gelu_(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), written over `x`: exact GELU, without gradients.

    On a CPU in float32 one pass of the C kernel, good to 3 units in the last place of x; elsewhere, and where
    SSMAMBA_BACKEND asks for another backend, torch's own.

    Args:
        x: (M, N), contiguous.
        bias: (N,), of the same dtype and device.

    Returns:
        `x`.

    Raises:
        RuntimeError: gradients are enabled. Tangents of forward mode are computed, by torch.
        TypeError: an argument is no dense floating tensor.
        ValueError: another shape, dtype or device, an `x` that is not contiguous, or SSMAMBA_BACKEND names no backend.

    Source: GELU, arXiv:1606.08415, sec. 2.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("bias_gelu_ overwrites its input and has no gradient: call it under torch.no_grad()")
    torch.ops.ssmamba.bias_gelu_(x, bias)
    return x


def _check(x: Tensor, bias: Tensor) -> None:
    """Run by the operator itself, for those who call it without the public function."""
    checks.expect_tensors("bias_gelu_", x=x, bias=bias)
    if x.ndim != 2 or bias.shape != x.shape[1:] or bias.dtype != x.dtype or bias.device != x.device:
        raise ValueError(
            f"bias_gelu_: x is {tuple(x.shape)} {x.dtype} on {x.device} and bias {tuple(bias.shape)} {bias.dtype} on "
            f"{bias.device}, expected (M, N) and (N,) of one dtype on one device"
        )
    if not x.is_contiguous():
        raise ValueError("bias_gelu_: x is not contiguous; call x.contiguous() first")


# Registered, so that tracers and dispatch modes see it.
@torch.library.custom_op("ssmamba::bias_gelu_", mutates_args=("x",))
def _bias_gelu(x: Tensor, bias: Tensor) -> None:
    _check(x, bias)
    if x.device.type == "cpu" and x.dtype == torch.float32 and dispatch.is_served_by("c", x.device.type):
        from ssmamba_models.ops.cpu import backend

        backend.bias_gelu_(x, bias)
    else:
        x.copy_(F.gelu(x + bias))


@_bias_gelu.register_fake
def _fake(x: Tensor, bias: Tensor) -> None:
    _check(x, bias)


def _formula(x: Tensor, bias: Tensor) -> None:
    _check(x, bias)
    x.copy_(F.gelu(x + bias))


register_formula(_bias_gelu, _formula)
