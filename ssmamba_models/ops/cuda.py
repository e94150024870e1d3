"""The "cuda" backend: mamba-ssm's `selective_scan_cuda` and causal-conv1d's `causal_conv1d_fn`, where they import.

Both are optional for ever. They are probed once, alone (`import mamba_ssm` pulls in much and fails in many ways), and
whatever a probe raises counts as missing. Their limits are checked before each call: beyond them they read out of
bounds or fail inside the kernel.

Slower than the Triton backend for `directional_scan`, which they know only as a scan of four groups of channels over
four permuted copies of the input. mamba-ssm's backward adds with atomics, so two runs may differ in the last bits, and
it has no gradient of the last state: where one is asked for, the torch backend's formulas compute the backward.

Sources: the interfaces are those of mamba-ssm's and causal-conv1d's Python wrappers (Apache-2.0 and BSD-3).
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ssmamba_models.ops import vectorized
from ssmamba_models.ops.alignment import aligned, all_aligned
from ssmamba_models.ops.reference import DIRECTIONS, to_map, to_sequence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_STATES = 256
MOST_CHANNELS = 65535  # second dimension of a CUDA grid
CURE = (
    "on a machine with nvcc: pip install --no-build-isolation mamba-ssm causal-conv1d "
    "(the scan needs a release or a build that still has selective_scan_cuda)"
)
# softplus of this is 0 exactly, and float16 holds it.
HELD = -1e4


def _probe(module: str, attribute: str | None = None) -> tuple[Any, str]:
    """The module or its attribute and "", or None and why there is none."""
    try:
        found = importlib.import_module(module)
        return (getattr(found, attribute) if attribute else found), ""
    except BaseException as error:  # extensions built for another torch raise anything, SystemExit included
        if isinstance(error, KeyboardInterrupt):
            raise
        return None, f"{module} cannot be used ({type(error).__name__}: {error})"


@functools.cache
def scan_module() -> tuple[ModuleType | None, str]:
    """mamba-ssm's compiled scan, or None and the reason."""
    return _probe("selective_scan_cuda")


@functools.cache
def conv_function() -> tuple[Any, str]:
    """causal-conv1d's function, or None and the reason."""
    return _probe("causal_conv1d", "causal_conv1d_fn")


def why_missing(device: torch.device | None = None) -> tuple[str, str]:
    """("", "") if either can run here, else the reason and the cure."""
    if not torch.cuda.is_available():
        return "there is no CUDA or ROCm device", "use a machine with a GPU and a torch build for it"
    reasons = [reason for _, reason in (scan_module(), conv_function())]
    return ("; ".join(reasons), CURE) if all(reasons) else ("", "")


def unsupported(op: str, dtype: torch.dtype, states: int) -> str:
    """Why these arguments cannot be served, or ""."""
    _, reason = conv_function() if op == "causal_conv1d" else scan_module()
    if reason:
        return f"{reason}; {CURE}"
    if dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if states > MOST_STATES:
        return f"it holds up to {MOST_STATES} states, not {states}"
    return ""


def _check_channels(op: str, channels: int) -> None:
    if channels > MOST_CHANNELS:
        raise ValueError(
            f"{op}: backend 'cuda' takes up to {MOST_CHANNELS} channels, not {channels}; set SSMAMBA_BACKEND=torch"
        )


def _last_contiguous(x: Tensor | None) -> Tensor | None:
    """x itself if its time steps lie side by side, as the kernels require, else a copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


# ---- selective_scan ----


def _arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    _check_channels("selective_scan", u.shape[1])
    u, delta, A, B, C, D, z, delta_bias = all_aligned(u, delta, A, B, C, D, z, delta_bias)
    u, delta, B, C, z = (_last_contiguous(x) for x in (u, delta, B, C, z))
    D, delta_bias = (x if x is None else x.contiguous() for x in (D, delta_bias))
    return u, delta, A.contiguous(), B, C, D, z, delta_bias


def _run(arguments: tuple[Tensor | None, ...], delta_softplus: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y before the gate, the kernel's chunk states, and y."""
    module, reason = scan_module()
    if module is None:
        raise RuntimeError(f"{reason}; {CURE}")
    out, states, *gated = module.fwd(*arguments, delta_softplus)
    return out, states, gated[0] if gated else out


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
    _, states, y = _run(_arguments(u, delta, A, B, C, D, z, delta_bias), delta_softplus)
    # (batch, channels, chunks, 2 N): decay and state in turn.
    return y.contiguous(), states[:, :, -1, 1::2].contiguous()


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
    """Gradients of u, delta, A, B, C, D, z and delta_bias; an empty tensor where the input is None."""
    if grad_state is not None:
        return vectorized.selective_scan_backward(grad, grad_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    arguments, grad = _arguments(u, delta, A, B, C, D, z, delta_bias), aligned(grad)
    # The operator saves its inputs alone: memory for one more forward.
    out, states, _ = _run(arguments, delta_softplus)
    du, ddelta, dA, dB, dC, dD, dbias, *dz = scan_module()[0].bwd(
        *arguments, grad.contiguous(), states, None if z is None else out, None, delta_softplus, False
    )
    empty = u.new_empty(0)
    dD, dbias = (empty if x is None else g for x, g in ((D, dD), (delta_bias, dbias)))
    return du, ddelta, dA, dB, dC, dD, dz[0] if z is not None else empty, dbias


# ---- directional_scan: four groups of channels, one per direction ----


def _four(x: Tensor) -> Tensor:
    """(B, H, W, D) -> (B, 4 D, L): read in each direction."""
    return torch.cat([to_sequence(x, k).transpose(1, 2) for k in range(DIRECTIONS)], 1).contiguous()


def _four_projections(x: Tensor) -> Tensor:
    """(B, H, W, 4, N) -> (B, 4, N, L)."""
    return torch.stack([to_sequence(x[..., k, :], k).transpose(1, 2) for k in range(DIRECTIONS)], 1).contiguous()


def _sum_four(x: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`_four` and add up, in float32."""
    parts = x.float().chunk(DIRECTIONS, 1)
    return sum(to_map(part.transpose(1, 2), k, height, width) for k, part in enumerate(parts))


def _grouped(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None, hold: Tensor | None
) -> tuple[Tensor | None, ...]:
    _check_channels("directional_scan", DIRECTIONS * u.shape[3])
    u, delta, A, B, C, delta_bias = all_aligned(u, delta, A, B, C, delta_bias)
    if hold is not None:
        delta = delta.masked_fill(hold[..., None], HELD)
    bias = None if delta_bias is None else delta_bias.flatten().contiguous()
    A = A.flatten(0, 1).contiguous()
    return _four(u), _four(delta), A, _four_projections(B), _four_projections(C), None, None, bias


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
    u, D = all_aligned(u, D)
    _, _, out = _run(_grouped(u, delta, A, B, C, delta_bias, hold), True)
    y = _sum_four(out, *u.shape[1:3])
    y = y if D is None else y + D * u
    return y.to(u.dtype).contiguous()


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
    """Gradients of u, delta, A, B, C, D and delta_bias; an empty tensor where the input is None."""
    grad, u, D = all_aligned(grad, u, D)
    arguments, (height, width) = _grouped(u, delta, A, B, C, delta_bias, hold), u.shape[1:3]
    _, states, _ = _run(arguments, True)
    du, ddelta, dA, dB, dC, _, dbias, *_ = scan_module()[0].bwd(
        *arguments, _four(grad), states, None, None, True, False
    )
    du, ddelta = _sum_four(du, height, width), _sum_four(ddelta, height, width)
    dB, dC = (
        torch.stack([to_map(x[:, k].transpose(1, 2), k, height, width) for k in range(DIRECTIONS)], 3) for x in (dB, dC)
    )
    empty = u.new_empty(0)
    wide = grad.float()
    du, dD = (du, empty) if D is None else (du + D * wide, (wide * u).sum((0, 1, 2)))
    dbias = empty if delta_bias is None else dbias.view(DIRECTIONS, -1)
    return du.to(u.dtype), ddelta.to(u.dtype), dA.view(DIRECTIONS, -1, A.shape[2]), dB, dC, dD, dbias


# ---- causal_conv1d ----


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    function, reason = conv_function()
    if function is None:
        raise RuntimeError(f"{reason}; {CURE}")
    _check_channels("causal_conv1d", x.shape[1])
    return function(x, weight, bias if bias is None else bias.contiguous(), activation="silu" if silu else None)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """See :func:`ssmamba_models.ops.causal_conv1d`."""
    x, weight, bias = all_aligned(x, weight, bias)
    return _convolve(_last_contiguous(x), weight.contiguous(), bias, silu).contiguous()


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and bias, by the function's own backward: the layer below it changes between releases."""
    grad, x, weight, bias = all_aligned(grad, x, weight, bias)
    inputs = (_last_contiguous(x), weight.contiguous(), bias)
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        y = _convolve(*leaves, silu)
    grads = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad.contiguous()))
    return tuple(x.new_empty(0) if leaf is None else next(grads) for leaf in leaves)
