"""The torch backend: the operators in whole-tensor torch operations, on any device and in any floating dtype.

A recurrence of length L is cut into about sqrt(L) chunks. All chunks run at once, step by step, from a zero state;
then the states at the chunk ends are carried across, and each chunk receives its share. That is 2 sqrt(L) torch calls
instead of L, and it never divides by a decay, so it is as stable as the plain loop. Gradients are the same recurrence
run backwards. Memory is linear in L: a few arrays of (images, L, D, N), with as many images at a time as keep each
near :data:`WORKING_SET` elements (larger ones cost more in page faults and cache misses than in arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmamba_models.ops.reference import DIRECTIONS, to_map, to_sequence

WORKING_SET = 2**21


def why_missing(device: torch.device | None = None) -> tuple[str, str]:
    """Always there."""
    return "", ""


def unsupported(op: str, dtype: torch.dtype, states: int) -> str:
    """Every floating dtype, any number of states."""
    return ""


def linear_recurrence(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """h_t = a_t h_(t-1) + b_t along dimension 1, from h_0 = `initial` or 0.

    Args:
        a, b: (batch, L, ...), of the same shape.
        initial: (batch, ...) or None.

    Returns:
        All states, (batch, L, ...).
    """
    batch, length = b.shape[:2]
    if length == 0:
        return b
    if initial is not None:
        first = b[:, :1] + a[:, :1] * initial[:, None]
        b = torch.cat([first, b[:, 1:]], 1)
    steps = math.isqrt(length - 1) + 1
    chunks = -(-length // steps)
    missing = chunks * steps - length
    if missing:  # steps after the end change nothing that is kept
        tail = b.new_zeros(batch, missing, *b.shape[2:])
        a, b = torch.cat([a, tail], 1), torch.cat([b, tail], 1)
    a, b = (x.unflatten(1, (chunks, steps)) for x in (a, b))
    states, decays = [b[:, :, 0]], [a[:, :, 0]]
    for t in range(1, steps):
        states.append(torch.addcmul(b[:, :, t], a[:, :, t], states[-1]))
        decays.append(decays[-1] * a[:, :, t])
    h, decay = torch.stack(states, 2), torch.stack(decays, 2)
    carry = torch.zeros_like(h[:, 0, 0])
    carries = []
    for i in range(chunks):
        carries.append(carry)
        carry = torch.addcmul(h[:, i, -1], decay[:, i, -1], carry)
    h = torch.addcmul(h, decay, torch.stack(carries, 1)[:, :, None])
    return h.flatten(1, 2)[:, :length]


# The sequence core: u, dt (batch, L, G, E), A (G, E, N), B, C (batch, L, G, N), with G groups of E channels.


def _states(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Decays and states, both (batch, L, G, E, N)."""
    decay = torch.exp(dt[..., None] * A)
    return decay, linear_recurrence(decay, (dt * u)[..., None] * B[..., None, :], initial)


def _scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """y (batch, L, G, E) and the last state (batch, G, E, N)."""
    _, h = _states(u, dt, A, B)
    last = h[:, -1] if h.shape[1] else h.new_zeros(h.shape[0], *h.shape[2:])
    return (h * C[..., None, :]).sum(-1), last


def _scan_backward(
    grad: Tensor, grad_state: Tensor | None, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B and C, and y again.

    With s_t = dL/dh_t = c_t dy_t + a_(t+1) s_(t+1): a recurrence from the end, its decays shifted by one step.
    """
    decay, h = _states(u, dt, A, B)
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
    from_y = grad[..., None] * C[..., None, :]
    shifted = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], 1)
    s = linear_recurrence(shifted.flip(1), from_y.flip(1), grad_state).flip(1)
    through_decay = s * decay * before
    d_dtu = (s * B[..., None, :]).sum(-1)
    d_dt = (through_decay * A).sum(-1) + d_dtu * u
    dA = (through_decay * dt[..., None]).sum((0, 1))
    dB = (s * (dt * u)[..., None]).sum(-2)
    dC = (grad[..., None] * h).sum(-2)
    return d_dtu * dt, d_dt, dA, dB, dC, (h * C[..., None, :]).sum(-1)


def _image_slices(u: Tensor, states: int) -> list[slice]:
    """The batch in pieces whose (images, L, D, N) arrays hold about WORKING_SET elements. GPUs take it whole."""
    batch = u.shape[0]
    step = batch if u.device.type != "cpu" else max(1, WORKING_SET * batch // (u.numel() * states))
    return [slice(i, i + step) for i in range(0, batch, step)]


def _cut(piece: slice, *tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x[piece] for x in tensors]


def _joined(results: Sequence[tuple[Tensor, ...]], per_image: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Results of pieces of a batch: concatenated where they are per image, added where they are of parameters."""
    return tuple(
        torch.cat(parts) if concatenate else torch.stack(parts).sum(0)
        for parts, concatenate in zip(zip(*results), per_image, strict=True)
    )


def _compute_dtype(u: Tensor) -> torch.dtype:
    return torch.promote_types(u.dtype, torch.float32)


# ---- directional_scan: one direction after another, so that the large arrays exist once, not four times ----


def _direction(
    k: int, u: Tensor, pre: Tensor, A: Tensor, B: Tensor, C: Tensor, hold: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The arguments of the sequence core in direction k, and the mask of the steps that are not held."""
    u, pre = (to_sequence(x, k)[:, :, None] for x in (u, pre))
    b, c = (to_sequence(x[..., k : k + 1, :], k).to(dtype) for x in (B, C))
    dt = F.softplus(pre)
    if hold is not None:
        dt = dt.masked_fill(to_sequence(hold, k)[..., None, None], 0.0)
    return u, pre, dt, A[k : k + 1].to(dtype), b, c


def _with_bias(delta: Tensor, delta_bias: Tensor | None, k: int) -> Tensor:
    return delta if delta_bias is None else delta + delta_bias[k].to(delta.dtype)


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
    pieces = [_cut(s, u, delta, B, C, hold) for s in _image_slices(u, A.shape[2])]
    return torch.cat([_scan_maps(u, delta, A, B, C, D, delta_bias, hold) for u, delta, B, C, hold in pieces])


def _scan_maps(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    hold: Tensor | None,
) -> Tensor:
    dtype, (height, width) = _compute_dtype(u), u.shape[1:3]
    x, delta = u.to(dtype), delta.to(dtype)
    y = torch.zeros_like(x) if D is None else D.to(dtype) * x
    for k in range(DIRECTIONS):
        seq, _, dt, a, b, c = _direction(k, x, _with_bias(delta, delta_bias, k), A, B, C, hold, dtype)
        y = y + to_map(_scan(seq, dt, a, b, c)[0][:, :, 0], k, height, width)
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
    """Gradients of u, delta, A, B, C, D and delta_bias."""
    pieces = [_cut(s, grad, u, delta, B, C, hold) for s in _image_slices(u, A.shape[2])]
    results = [_scan_maps_backward(g, u, delta, A, B, C, D, delta_bias, hold) for g, u, delta, B, C, hold in pieces]
    return _joined(results, (True, True, False, True, True, False, False))


def _scan_maps_backward(
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
    dtype, (height, width) = _compute_dtype(u), u.shape[1:3]
    x, delta, grad = u.to(dtype), delta.to(dtype), grad.to(dtype)
    dD = (grad * x).sum((0, 1, 2))
    du = torch.zeros_like(x) if D is None else D.to(dtype) * grad
    ddelta = torch.zeros_like(x)
    dA: Any
    dA, dB, dC, dbias = [], [], [], []
    for k in range(DIRECTIONS):
        seq, pre, dt, a, b, c = _direction(k, x, _with_bias(delta, delta_bias, k), A, B, C, hold, dtype)
        g = to_sequence(grad, k)[:, :, None]
        du_k, ddt, da, db, dc, _ = _scan_backward(g, None, seq, dt, a, b, c)
        # A held step has dt = 0 whatever delta is.
        slope = torch.sigmoid(pre)
        if hold is not None:
            slope = slope.masked_fill(to_sequence(hold, k)[..., None, None], 0.0)
        dpre = to_map((ddt * slope)[:, :, 0], k, height, width)
        du, ddelta = du + to_map(du_k[:, :, 0], k, height, width), ddelta + dpre
        dbias.append(dpre.sum((0, 1, 2)))
        dA.append(da[0])
        dB.append(to_map(db[:, :, 0], k, height, width))
        dC.append(to_map(dc[:, :, 0], k, height, width))
    dA, dbias = torch.stack(dA), torch.stack(dbias)
    dB, dC = torch.stack(dB, 3), torch.stack(dC, 3)
    return du.to(u.dtype).contiguous(), ddelta.to(u.dtype).contiguous(), dA, dB, dC, dD, dbias


# ---- selective_scan ----


def _grouped(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, ...]:
    """The arguments of the sequence core, and delta before softplus."""
    dtype, groups = _compute_dtype(u), B.shape[1]
    pre = delta.to(dtype)
    pre = pre if delta_bias is None else pre + delta_bias.to(dtype)[:, None]
    seq, pre = (x.transpose(1, 2).unflatten(2, (groups, -1)) for x in (u.to(dtype), pre))
    dt = F.softplus(pre) if delta_softplus else pre
    b, c = (x.to(dtype).permute(0, 3, 1, 2) for x in (B, C))
    return seq, pre, dt, A.to(dtype).unflatten(0, (groups, -1)), b, c


def _ungrouped(x: Tensor) -> Tensor:
    """(batch, L, G, E) -> (batch, G * E, L)."""
    return x.flatten(2).transpose(1, 2)


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
    pieces = [_cut(s, u, delta, B, C, z) for s in _image_slices(u, A.shape[1])]
    results = [
        _scan_sequences(u, delta, A, B, C, D, z, delta_bias, delta_softplus) for u, delta, B, C, z in pieces
    ]
    return _joined(results, (True, True))


def _scan_sequences(
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
    dtype = _compute_dtype(u)
    seq, _, dt, a, b, c = _grouped(u, delta, A, B, C, delta_bias, delta_softplus)
    y, state = _scan(seq, dt, a, b, c)
    y = _ungrouped(y)
    y = y if D is None else y + D.to(dtype)[:, None] * u.to(dtype)
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(u.dtype).contiguous(), state.flatten(1, 2).contiguous()


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
    pieces = [_cut(s, grad, grad_state, u, delta, B, C, z) for s in _image_slices(u, A.shape[1])]
    results = [
        _scan_sequences_backward(grad, grad_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        for grad, grad_state, u, delta, B, C, z in pieces
    ]
    return _joined(results, (True, True, False, True, True, False, True, False))


def _scan_sequences_backward(
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
    dtype = _compute_dtype(u)
    seq, pre, dt, a, b, c = _grouped(u, delta, A, B, C, delta_bias, delta_softplus)
    grad, x = grad.to(dtype), u.to(dtype)
    dy = grad if z is None else grad * F.silu(z.to(dtype))
    state = None if grad_state is None else grad_state.to(dtype).unflatten(1, a.shape[:2])
    g = dy.transpose(1, 2).unflatten(2, a.shape[:2])
    du, ddt, dA, dB, dC, y = _scan_backward(g, state, seq, dt, a, b, c)
    dpre = _ungrouped(ddt * torch.sigmoid(pre) if delta_softplus else ddt)
    du = _ungrouped(du)
    du = du if D is None else du + D.to(dtype)[:, None] * dy
    dz = torch.zeros_like(u)
    if z is not None:
        y = _ungrouped(y)
        y = y if D is None else y + D.to(dtype)[:, None] * x
        gate = torch.sigmoid(z.to(dtype))
        dz = (grad * y * gate * (1 + z.to(dtype) * (1 - gate))).to(u.dtype)
    dD = (dy * x).sum((0, 2))
    dB, dC = (t.permute(0, 2, 3, 1).contiguous() for t in (dB, dC))
    du, ddelta = (t.to(u.dtype).contiguous() for t in (du, dpre))
    return du, ddelta, dA.flatten(0, 1), dB, dC, dD, dz, dpre.sum((0, 2))


# ---- causal_conv1d ----


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """See :func:`ssmamba_models.ops.causal_conv1d`."""
    dtype, taps = _compute_dtype(x), weight.shape[1]
    y = _convolve(x.to(dtype), weight.to(dtype), bias, taps)
    return (F.silu(y) if silu else y).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, taps: int) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    # Autocast, which reaches into custom operators, would run this in half precision.
    device = x.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        return F.conv1d(F.pad(x, (taps - 1, 0)), weight[:, None], bias, groups=x.shape[1])


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dtype, taps, length = _compute_dtype(x), weight.shape[1], x.shape[2]
    wide, kernel, dy = x.to(dtype), weight.to(dtype), grad.to(dtype)
    if silu:
        y = _convolve(wide, kernel, bias, taps)
        gate = torch.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    # Output t reads inputs t - taps + 1 .. t, so input t feeds outputs t .. t + taps - 1: time reversed.
    dx = _convolve(dy.flip(2), kernel, None, taps).flip(2)
    padded = F.pad(wide, (taps - 1, 0))
    dweight = torch.stack([(dy * padded[:, :, j : j + length]).sum((0, 2)) for j in range(taps)], 1)
    return dx.to(x.dtype), dweight, dy.sum((0, 2))
