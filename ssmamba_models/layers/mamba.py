"""Mamba: the 1-D selective state space block, for sequences such as the tiles of a slide."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ssmamba_models.ops import causal_conv1d, selective_scan

# The step sizes that a fresh block begins with, as in the paper's section 3.6.
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 0.1, 1e-4


class Mamba(nn.Module):
    """A selective state space block: each step of a sequence sees the present and the past, at linear cost.

    With D = expand * dim channels inside::

        [u, z] = x W_in
        u = SiLU(conv(u))                                 causal, depthwise, d_conv taps
        [r, B, C] = u W_x,   dt = softplus(r W_dt + b_dt)
        h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t,         A = -exp(A_log)
        y = ((C_t . h_t + D u_t) * SiLU(z_t)) W_out

    Parameters have mamba-ssm's names and shapes, so that a state dict of its `Mamba` loads.

    Args:
        dim: C, the width outside.
        d_state: N, the states of each channel.
        d_conv: taps of the convolution, 2 to 4.
        expand: D / C.
        dt_rank: rank of the step size projection; default ceil(C / 16).
        device, dtype: of the parameters, as in torch.

    Shape: (B, L, C) and a mask (B, L) or None -> (B, L, C). False in the mask marks padding, which lies at the
    beginning or the end of a sequence: it changes nothing at the other steps, and gives 0 itself.

    Raises:
        ValueError: an argument below 1, d_conv outside 2 to 4, or an input or a mask of another shape.
        TypeError: a mask that is not bool.

    Source: Gu and Dao, Mamba (arXiv:2312.00752), sections 3.4 and 3.6.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("d_state", d_state), ("expand", expand), ("dt_rank", dt_rank)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"Mamba: {name} is {value}, expected a whole number of at least 1")
        if d_conv not in (2, 3, 4):
            raise ValueError(f"Mamba: d_conv is {d_conv}, expected 2, 3 or 4")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.d_state, self.inner_dim = dim, d_state, expand * dim
        self.dt_rank = dt_rank or math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * self.inner_dim, bias=False, **dd)
        # A Conv1d for its name, shape and initial values; the convolution itself is causal_conv1d.
        self.conv1d = nn.Conv1d(self.inner_dim, self.inner_dim, d_conv, groups=self.inner_dim, **dd)
        self.x_proj = nn.Linear(self.inner_dim, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, self.inner_dim, **dd)
        self.A_log = nn.Parameter(torch.empty(self.inner_dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(self.inner_dim, **dd))
        self.out_proj = nn.Linear(self.inner_dim, dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give the state space its initial values: softplus(b_dt) log-uniform in [1e-3, 0.1], A -1..-N, D 1."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty_like(self.dt_proj.bias, dtype=torch.float32).uniform_(math.log(_DT_MIN), math.log(_DT_MAX))
        dt = dt.exp().clamp(min=_DT_FLOOR)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        states = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not be drawn to 0: they say how long the state remembers."""
        return {"A_log", "D", "dt_proj.bias"}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self._check(x, mask)
        keep = None if mask is None else mask[:, None]
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        if keep is not None:
            u = u * keep
        u = causal_conv1d(u, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
        if keep is not None:
            # The bias makes something of nothing; a step without input leaves an empty state empty.
            u = u * keep
        r, B, C = self.x_proj(u.transpose(1, 2)).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        delta = (r @ self.dt_proj.weight.T.to(r.dtype)).transpose(1, 2)
        y = selective_scan(
            u,
            delta,
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
        )
        y = self.out_proj(y.transpose(1, 2))
        return y if mask is None else y * mask[..., None]

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"Mamba: x has shape {tuple(x.shape)}, expected (B, L, {self.dim})")
        if mask is None:
            return
        if mask.dtype != torch.bool:
            raise TypeError(f"Mamba: mask must be a bool tensor, not {mask.dtype}; compare or cast it with .bool()")
        if mask.shape != x.shape[:2]:
            raise ValueError(f"Mamba: mask has shape {tuple(mask.shape)}, expected (B, L) = {tuple(x.shape[:2])}")
