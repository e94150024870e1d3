"""Inference on a CPU in pieces that stay in the caches.

As whole maps, the inner activations of a layer cost memory traffic, and every page of a fresh block a page fault, which
may take longer than what is computed on it.
"""

# No `from __future__ import annotations`: torch.fx and TorchScript read the annotations of the modules that use this.
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

PIECE_ELEMENTS = 2**20  # inner activations at a time, about: 4 MB in float32


def piece_length(items: int, elements: int) -> int:
    """How many of `items`, each with so many inner activations, make a piece: shares of a size, no small rest."""
    pieces = max(1, round(items * elements / PIECE_ELEMENTS))
    if pieces == 1:
        return max(1, items)
    grain = piece_grain(elements)
    return min(items, -(-items // (pieces * grain)) * grain)


def piece_grain(elements: int) -> int:
    """What the length of a piece is a multiple of: a library that prepares itself for each length meets few of them."""
    return max(1, PIECE_ELEMENTS // (16 * max(1, elements)))


def is_inference(x: Tensor) -> bool:
    """Whether what follows `x` may be computed in pieces, over the memory of intermediate results.

    Not where gradients need those results, not under a compiler, which fuses by itself, or a tracer, which would record
    so many pieces, and not under autocast, where a piece's dtype would not be the map's. A hook expects the whole map.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.device.type != "cpu":
        return False
    if torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    return not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def is_unwatched(module: nn.Module) -> bool:
    """Whether no part of the module has a hook, or dropout that was kept in training mode and is to be heard."""
    return not any(part.training or part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def is_own(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the layer does what this class does: not a subclass, a replacement, or one whose forward was set."""
    return type(layer) is kind and "forward" not in vars(layer)


def are_float32(layers: Iterable[nn.Module]) -> bool:
    """Whether the layers' parameters are float32 numbers, not a subclass of Tensor that stands for them."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    return all(type(p) in (Tensor, nn.Parameter) and p.dtype == torch.float32 for p in parameters)
