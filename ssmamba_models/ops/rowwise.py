"""LayerNorm and GELU of rows with their gradients, by torch: what ops/cpu/rows.py computes by C kernels.

Parts of the operators that join them to matrix products, which know the gradients: nothing here is differentiable.
Rows lie side by side; results are written where the caller says, so that pieces of a map share the same memory.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmamba_models.ops import dispatch
from ssmamba_models.ops.alignment import aligned

# Elements of the widest activation in a piece of a map: 4 MB in float32, so that what follows finds it in the caches.
PIECE_ELEMENTS = 2**20
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def is_served_by_c(x: Tensor) -> bool:
    """Whether the C kernels compute on tensors like x.

    Raises:
        ValueError: SSMAMBA_BACKEND names no backend.
    """
    return x.device.type == "cpu" and x.dtype in _NARROW and dispatch.is_served_by("c", x.device.type)


def kernels(x: Tensor) -> ModuleType:
    """The module with layer_norm, bias_gelu and their gradients for tensors like x: that of the C kernels, or this."""
    if not is_served_by_c(x):
        return sys.modules[__name__]
    from ssmamba_models.ops.cpu import rows

    return rows


def as_rows(x: Tensor, width: int) -> Tensor:
    """(..., width) -> (M, width), side by side where C may read them."""
    return aligned(x.reshape(-1, width).contiguous())


def piece_rows(width: int) -> int:
    """Rows of a piece whose widest activation has `width` values a row."""
    return max(64, PIECE_ELEMENTS // max(1, width))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> Tensor:
    """Write LayerNorm(x) to `out`, both (M, C); weight and bias (C,)."""
    return out.copy_(F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps))


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, add: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of LayerNorm's x, plus `add`, to `out`, which may be `grad`: all (M, C).

    Returns:
        The gradients of weight and bias (C,), in their dtype.
    """
    x, grad, shape = x.to(weight.dtype), grad.to(weight.dtype), list(weight.shape)
    _, mean, rstd = torch.native_layer_norm(x, shape, weight, None, eps)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, x, shape, mean, rstd, weight, torch.zeros_like(weight), [True, True, True]
    )
    out.copy_(dx if add is None else dx + add)
    return dweight, dbias


def bias_gelu(x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Write gelu(x + bias) to `out`: (M, N) and (N,)."""
    return out.copy_(F.gelu(x + bias))


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, scale: float, out: Tensor) -> Tensor:
    """Multiply `grad` by `scale` and the slope of gelu(x + bias), and write gelu(x + bias) to `out`: all (M, N).

    Returns:
        The gradient of bias (N,), in its dtype.
    """
    x = x + bias
    out.copy_(F.gelu(x))
    slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
    grad.copy_(grad * slope * scale)
    return grad.to(bias.dtype).sum(0)
