"""What every operator asks of its arguments, with errors that name the argument, what it is, and what was expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPTIONAL = ("D", "z", "delta_bias", "bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Devices that have autocast; the meta device, for one, has not. Asked once: torch.compile cannot trace it in torch 2.6.
_AUTOCAST = frozenset(
    name
    for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "ipu", "xla", "privateuseone")
    if torch.amp.is_autocast_available(name)
)


def expect_tensors(op: str, **arguments: Any) -> None:
    """Raises TypeError for what is no dense floating tensor (nor None, if optional), ValueError if devices differ."""
    first_name, first = next(iter(arguments.items()))
    for name, x in arguments.items():
        if x is None and name in OPTIONAL:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, not {type(x).__name__}")
        if x.is_nested or x.layout != torch.strided:
            kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            raise TypeError(f"{op}: {name} is a {kind} tensor; make it a dense one, as by .to_dense()")
        if x.is_complex():
            raise TypeError(f"{op}: {name} is complex; only real tensors are supported")
        if x.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected one of {known}; cast it with .float()")
        if x.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {x.device}, but {first_name} is on {first.device}; move them to one device"
            )


def expect_dims(op: str, name: str, x: Tensor, layout: str) -> None:
    """Raises ValueError unless x has as many dimensions as the layout, such as "B, H, W, D", has names."""
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected ({layout})")


def expect_shape(op: str, name: str, x: Tensor | None, layout: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless x is None or has that shape."""
    if x is None:
        return
    if x.dim() != len(shape) or any(have != want for have, want in zip(x.shape, shape)):
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected ({layout}) = {tuple(shape)}")


def expect_operator_dtypes(
    op: str, activations: tuple[Tensor | None, ...], parameters: tuple[Tensor | None, ...]
) -> None:
    """What the public functions see to, for those who call a registered operator by itself (a scripted or exported
    model, for one): the kernels read memory by these dtypes. Raises TypeError."""
    first, *others = [x.dtype for x in activations if x is not None]
    for dtype in others:
        if dtype != first:
            raise TypeError(f"{op}: the activations are {first} and {dtype}; cast them to one dtype")
    wanted = torch.float64 if first == torch.float64 else torch.float32
    for x in parameters:
        if x is not None and x.dtype != wanted:
            raise TypeError(f"{op}: a parameter is {x.dtype}, expected {wanted} beside {first} activations")


def activations(op: str, u: Tensor, **others: Tensor | None) -> tuple[Any, ...]:
    """The activations in one dtype: autocast's where autocast is on, else the one that they share.

    Raises:
        TypeError: they differ and autocast is off.
    """
    device = u.device.type
    if u.dtype != torch.float64 and device in _AUTOCAST and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(None if x is None else x.to(dtype) for x in (u, *others.values()))
    for name, x in others.items():
        if x is not None and x.dtype != u.dtype:
            raise TypeError(f"{op}: {name} is {x.dtype}, but the first argument is {u.dtype}; cast them to one dtype")
    return (u, *others.values())


def parameters(u: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """A, D and biases in the precision of the recurrence: float32, or float64 for float64 activations."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def expect_gradient(op: str, grad: Tensor, u: Tensor) -> None:
    """Raises ValueError or TypeError unless grad is like u."""
    expect_shape(op, "the gradient", grad, "that of the input", tuple(u.shape))
    if grad.dtype != u.dtype:
        raise TypeError(f"{op}: the gradient is {grad.dtype}, but the input is {u.dtype}; cast it")
