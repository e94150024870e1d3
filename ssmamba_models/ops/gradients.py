"""What a backward operator's results must be: one tensor per input, of its dtype, whatever a backend gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def like_inputs(inputs: Sequence[Any], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each gradient in its input's dtype, contiguous; an empty tensor (schemas have no optional results) for None."""
    first = inputs[0]
    return tuple(
        first.new_empty(0) if x is None else g.to(x.dtype).contiguous() for x, g in zip(inputs, grads, strict=True)
    )


def zeros_like_inputs(inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Zeros shaped as :func:`like_inputs` would return them."""
    first = inputs[0]
    return tuple(
        first.new_empty(0) if x is None else torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in inputs
    )


def pulled_back(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the inputs of a function made of torch's operators, differentiable in turn."""
    _, vjp = torch.func.vjp(function, *inputs)  # type: ignore[misc]
    return vjp(grad)
