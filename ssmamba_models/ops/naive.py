"""The reference backend: the definitions of reference.py as a backend, with gradients by automatic differentiation.

For comparison only (SSMAMBA_BACKEND=reference): nothing selects it by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmamba_models.ops import reference


def why_missing(device: torch.device | None = None) -> tuple[str, str]:
    """Always there."""
    return "", ""


def unsupported(op: str, dtype: torch.dtype, states: int) -> str:
    """Every floating dtype, any number of states."""
    return ""


def _gradients(
    function: Callable[..., Any], inputs: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]
) -> list[Tensor]:
    """vjp of `function` over those inputs that are given; an empty tensor for each that is None."""
    given = [i for i, x in enumerate(inputs) if x is not None]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(inputs)
        for i, x in zip(given, tensors):
            filled[i] = x
        out = function(*filled)
        return out if isinstance(out, tuple) else (out,)

    # torch.func, because automatic differentiation of the ordinary kind is switched off inside a custom operator.
    _, vjp = torch.func.vjp(call, *(inputs[i] for i in given))
    result = [grads[0].new_zeros(0) for _ in inputs]
    for i, g in zip(given, vjp(grads)):
        result[i] = g.contiguous()
    return result


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
    return reference.directional_scan(u, delta, A, B, C, D, delta_bias, hold).contiguous()


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
    """Gradients of u, delta, A, B, C, D and delta_bias."""
    function = lambda *inputs: reference.directional_scan(*inputs, hold)  # noqa: E731
    return tuple(_gradients(function, (u, delta, A, B, C, D, delta_bias), (grad,)))


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
    """See :func:`ssmamba_models.ops.selective_scan`."""
    y, state = reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return y.contiguous(), state


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
    """Gradients of u, delta, A, B, C, D, z and delta_bias."""
    function = lambda *inputs: reference.selective_scan(*inputs, delta_softplus)  # noqa: E731
    if grad_state is None:
        dtype = torch.promote_types(u.dtype, torch.float32)
        grad_state = A.new_zeros(u.shape[0], *A.shape, dtype=dtype)
    return tuple(_gradients(function, (u, delta, A, B, C, D, z, delta_bias), (grad, grad_state)))


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """See :func:`ssmamba_models.ops.causal_conv1d`."""
    return reference.causal_conv1d(x, weight, bias, "silu" if silu else None).contiguous()


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    function = lambda *inputs: reference.causal_conv1d(*inputs, "silu" if silu else None)  # noqa: E731
    return tuple(_gradients(function, (x, weight, bias), (grad,)))
