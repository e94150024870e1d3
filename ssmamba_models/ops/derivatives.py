"""Derivatives that no kernel computes, of forward mode and of a gradient, by formulas in torch's own operators.

A kernel writes numbers that torch knows nothing about: tangents (torch.func.jvp, torch.autograd.forward_ad) would be
lost on the way without an error. So each registered operator looks for them first, and where there are any leaves the
work to a formula, which torch differentiates in every mode and nesting. Gradients of a gradient come about alike. Both
take the time and memory of the torch backend, whichever backend computes the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.library import CustomOpDef

# By device: what custom_op registers for all of them, under the key "Autograd", gives way to these.
_KEYS = tuple(f"Autograd{name}" for name in ("CPU", "CUDA", "MPS", "XPU", "HPU", "XLA", "Meta", "PrivateUse1"))
_library = torch.library.Library("ssmamba", "FRAGMENT")


def has_tangents(*arguments: Any) -> bool:
    """Whether forward-mode differentiation is on, and one of the arguments is a tensor with a tangent."""
    # Asking a tensor takes 5 us, too long to do so without need. Compiled graphs enter forward mode past this counter.
    on = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()
    return on and any(
        isinstance(x, Tensor) and x.is_floating_point() and forward_ad.unpack_dual(x, level=0).tangent is not None
        for x in arguments
    )


def register_formula(op: CustomOpDef, formula: Callable[..., Any]) -> None:
    """Have `formula` compute the operator where the derivatives that are asked for are not registered.

    These are tangents, gradients inside torch.func's transforms (which know none that are registered in Python) and,
    of an operator without register_autograd, all gradients.

    Args:
        op: after its register_autograd, if it has gradients.
        formula: takes the operator's arguments, checks them as it does and returns what it does; of torch's operators.
    """
    registered = make_autograd_impl(op._opoverload, op)

    def is_beyond(*arguments: Any) -> bool:
        if op._backward_fn is not None and not torch._C._are_functorch_transforms_active():
            return False
        return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if has_tangents(*arguments) or is_beyond(*arguments):
            return formula(*arguments)
        return registered(keyset, *arguments)

    for key in _KEYS:
        _library.impl(op._name, kernel, key, with_keyset=True)
