"""The definition of every operator: naive, short, slow, in any floating dtype.

Everything else in :mod:`ssmamba_models.ops` is measured against these functions. They compute in float32, or in
float64 when the input is float64, and return the dtype of the input.

Sources: the selective state space recurrence is Mamba's (Gu and Dao, arXiv:2312.00752, Algorithm 2); scanning an
image in four directions is VMamba's (Liu et al., arXiv:2401.10166, SS2D).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = 4  # rows, columns, rows reversed, columns reversed


def to_sequence(x: Tensor, k: int) -> Tensor:
    """Read a map in direction `k`: (B, H, W, ...) -> (B, H*W, ...)."""
    x = x.transpose(1, 2) if k % 2 else x
    x = x.flatten(1, 2)
    return x.flip(1) if k >= 2 else x


def to_map(x: Tensor, k: int, height: int, width: int) -> Tensor:
    """Undo :func:`to_sequence`: (B, H*W, ...) -> (B, H, W, ...)."""
    x = x.flip(1) if k >= 2 else x
    if k % 2:
        return x.unflatten(1, (width, height)).transpose(1, 2)
    return x.unflatten(1, (height, width))


def recurrence(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t and y_t = C_t . h_t, one step at a time.

    Args:
        u, dt: (batch, L, D).
        A: (D, N).
        B, C: (batch, L, D or 1, N).

    Returns:
        y (batch, L, D) and the last state (batch, D, N).
    """
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    y = []
    # unbind, not x[:, t]: the gradient of an index is a zero tensor of the whole length, at every step.
    for u_t, dt_t, B_t, C_t in zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        h = torch.exp(dt_t[..., None] * A) * h + dt_t[..., None] * B_t * u_t[..., None]
        y.append((h * C_t).sum(-1))
    return torch.stack(y, 1) if y else torch.zeros_like(u), h


def directional_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    hold: Tensor | None = None,
) -> Tensor:
    """See :func:`ssmamba_models.ops.directional_scan`."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    out_dtype, (height, width) = u.dtype, u.shape[1:3]
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    y = torch.zeros_like(u) if D is None else D.to(dtype) * u
    for k in range(DIRECTIONS):
        dt = F.softplus(delta if delta_bias is None else delta + delta_bias[k].to(dtype))
        if hold is not None:
            dt = dt.masked_fill(hold[..., None], 0.0)
        b, c = B[..., k, None, :], C[..., k, None, :]
        out, _ = recurrence(*(to_sequence(x, k) for x in (u, dt)), A[k], *(to_sequence(x, k) for x in (b, c)))
        y = y + to_map(out, k, height, width)
    return y.to(out_dtype)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`ssmamba_models.ops.selective_scan`; B and C are (batch, G, N, L). Always returns the last state."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    out_dtype, channels = u.dtype, u.shape[1]
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    dt = delta if delta_bias is None else delta + delta_bias.to(dtype)[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    # Group g serves channels g*D/G .. (g+1)*D/G - 1.
    b, c = (x.repeat_interleave(channels // x.shape[1], 1).permute(0, 3, 1, 2) for x in (B, C))
    y, state = recurrence(u.transpose(1, 2), dt.transpose(1, 2), A, b, c)
    y = y.transpose(1, 2)
    y = y if D is None else y + D.to(dtype)[:, None] * u
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(out_dtype), state


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """See :func:`ssmamba_models.ops.causal_conv1d`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    taps, length = weight.shape[1], x.shape[2]
    padded = F.pad(x.to(dtype), (taps - 1, 0))
    y = sum(weight[:, j, None].to(dtype) * padded[:, :, j : j + length] for j in range(taps))
    y = y if bias is None else y + bias.to(dtype)[:, None]
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype)


def depthwise3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False, residual: bool = False
) -> Tensor:
    """See :func:`ssmamba_models.ops.depthwise.depthwise3x3`."""
    dtype, (height, width) = torch.promote_types(x.dtype, torch.float32), x.shape[1:3]
    padded = F.pad(x.to(dtype), (0, 0, 1, 1, 1, 1))
    y = x.to(dtype) if residual else torch.zeros_like(x, dtype=dtype)
    y = y if bias is None else y + bias.to(dtype)
    for i in range(3):
        for j in range(3):
            y = y + weight[:, 0, i, j].to(dtype) * padded[:, i : i + height, j : j + width]
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """See :func:`ssmamba_models.ops.norm_linear.norm_linear`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    tensors = (t.to(dtype) for t in (x, norm_weight, norm_bias))
    y = scale * (_layer_norm(*tensors, eps) @ weight.to(dtype).T)
    return (y if residual is None else residual.to(dtype) + y).to(x.dtype)


def residual_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float = 1e-6,
    scale: float = 1.0,
) -> Tensor:
    """See :func:`ssmamba_models.ops.residual_mlp.residual_mlp`."""
    dtype, out_dtype = torch.promote_types(x.dtype, torch.float32), x.dtype
    parameters = (norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    x, norm_weight, norm_bias, weight1, bias1, weight2, bias2 = (t.to(dtype) for t in (x, *parameters))
    h = _layer_norm(x, norm_weight, norm_bias, eps) @ weight1.T + bias1
    active = h * (1 + torch.erf(h / 2**0.5)) / 2
    return (x + scale * (active @ weight2.T + bias2)).to(out_dtype)


def pool(x: Tensor, scale: int) -> Tensor:
    """Means over windows of scale x scale tokens, cut off at the border: the map of DMS's coarser scales.

    Shape: (B, H, W, C) -> (B, ceil(H / scale), ceil(W / scale), C).
    """
    rows = [x[:, i : i + scale] for i in range(0, x.shape[1], scale)]
    windows = [[row[:, :, j : j + scale].mean((1, 2)) for j in range(0, x.shape[2], scale)] for row in rows]
    return torch.stack([torch.stack(row, 1) for row in windows], 1)


def upsample(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation between the centres of tokens: a scale's result at full resolution.

    Shape: (B, h, w, C) -> (B, height, width, C).
    """
    for axis, size in ((1, height), (2, width)):
        small = x.shape[axis]
        place = ((torch.arange(size, dtype=torch.float64) + 0.5) * small / size - 0.5).clamp(min=0)
        low = place.long().clamp(max=small - 1)
        high = (low + 1).clamp(max=small - 1)
        share = (place - low).to(x.dtype).view(-1, *[1] * (3 - axis))
        x = x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share
    return x
