"""DMS, Directional Multi-scale module: a map scanned in four directions at one or more scales."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, register_notrace_module, trunc_normal_
from torch import Tensor, nn

from ssmamba_models.ops import directional_scan
from ssmamba_models.ops.reference import DIRECTIONS

SCAN_INITS = ("silent", "unit")


def _check_hold(hold: Tensor, x: Tensor) -> None:
    # Here and not in the scan alone: a pooled mask would hide a wrong dtype or shape.
    if hold.dtype != torch.bool:
        raise TypeError(f"DMS: hold must be a bool tensor, not {hold.dtype}; compare or cast it with .bool()")
    if hold.shape != x.shape[:3]:
        raise ValueError(f"DMS: hold has shape {tuple(hold.shape)}, expected (B, H, W) = {tuple(x.shape[:3])}")


def pool_hold(hold: Tensor, scale: int) -> Tensor:
    """Coarsen a hold mask: a pooled token is held where all of its tokens are.

    Shape: (B, H, W) bool -> (B, ceil(H / scale), ceil(W / scale)) bool.
    """
    free = F.max_pool2d((~hold)[:, None].float(), scale, ceil_mode=True)
    return free[:, 0] == 0


@register_notrace_module  # one node for torch.fx: what the scan checks depends on the tensors
class DirectionalSSM(nn.Module):
    """The selective scan of one scale: pool, project, scan in four directions, sum, upsample.

    With V the input at 1/scale of its resolution, width D::

        [r, b_1..4, c_1..4] = V W_x
        delta_k = softplus(r W_delta + tau_k)
        h_t = exp(delta_t A_k) h_(t-1) + delta_t (b_(k,t) + beta_k) V_t,   A_k = -exp(alpha_k)
        Y = d * V + sum_k c_k . h

    Args:
        dim: D, the width of this scale.
        dt_rank: rank of W_delta.
        d_state: N, the states of each channel.
        scale: 1, or the factor by which the map is average-pooled before the scan.
        scan_init: "silent" or "unit", see :class:`DMS`.
        device, dtype: of the parameters, as in torch.

    Shape: (B, H, W, D) and a hold mask (B, H, W) or None -> (B, H, W, D).

    Source: SSMamba (arXiv:2604.15711), DMS, as this project reads it; scan and parameters as VMamba v05
    (arXiv:2401.10166), scales as MSVMamba (arXiv:2405.14174).
    """

    def __init__(
        self,
        dim: int,
        dt_rank: int,
        d_state: int = 1,
        scale: int = 1,
        scan_init: str = "silent",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scale, self.d_state, self.dt_rank, self.scan_init = scale, d_state, dt_rank, scan_init
        self.directions = DIRECTIONS
        self.x_proj = nn.Linear(dim, dt_rank + 2 * DIRECTIONS * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(dt_rank, dim, bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(DIRECTIONS, dim, **dd))  # tau
        self.A_log = nn.Parameter(torch.empty(DIRECTIONS, dim, d_state, **dd))  # alpha
        self.B_bias = nn.Parameter(torch.empty(DIRECTIONS, d_state, **dd))  # beta
        self.D = nn.Parameter(torch.empty(dim, **dd))  # d
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """softplus(tau) log-uniform in [1e-3, 0.1]; alpha log(1..N), which is 0 for one state; d 1.

        W_x has a standard deviation of 0.02 and beta is 0 ("silent"), or D ** -0.5 and 1 ("unit").
        """
        unit = self.scan_init == "unit"
        trunc_normal_(self.x_proj.weight, std=self.x_proj.in_features**-0.5 if unit else 0.02)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        states = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.constant_(self.B_bias, 1.0 if unit else 0.0)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, hold: Tensor | None = None) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        if self.scale > 1:
            pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.scale, ceil_mode=True, count_include_pad=False)
            v = pooled.permute(0, 2, 3, 1)
            if hold is not None:
                hold = pool_hold(hold, self.scale)
        else:
            v = x
        states = self.directions * self.d_state
        r, b, c = torch.split(self.x_proj(v), [self.dt_rank, states, states], dim=-1)
        b, c = b.unflatten(-1, (self.directions, self.d_state)), c.unflatten(-1, (self.directions, self.d_state))
        delta = self.dt_proj(r)
        b = b + self.B_bias.to(b.dtype)
        # The scan's own precision: float32, and float64 for float64 alone.
        wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        A = -torch.exp(self.A_log.to(wide))
        if torch.jit.is_scripting():
            # TorchScript's promotion differs from eager mode's under autocast; the operator wants one dtype.
            delta, b, c = delta.to(v.dtype), b.to(v.dtype), c.to(v.dtype)
            y = torch.ops.ssmamba.directional_scan(v, delta, A, b, c, self.D.to(wide), self.dt_bias.to(wide), hold)
        else:
            y = directional_scan(v, delta, A, b, c, self.D, self.dt_bias, hold)
        if self.scale > 1:
            y = F.interpolate(y.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=False)
            y = y.permute(0, 2, 3, 1)
        return y


class DMS(nn.Module):
    """Directional Multi-scale module.

    ``u = SiLU(DWConv3x3(x W_in))``; the channels of u are split among the scales, each is scanned by a
    :class:`DirectionalSSM`; ``DMS(x) = LN([Y_1; Y_2; ...]) W_out``.

    Args:
        dim: width C.
        scales: pooling factor of each scale; (1, 2) scans half of the channels at full and half at half resolution.
        d_state: states per channel N.
        dt_rank: rank of the step size projection; default max(4, ceil(C / 16)).
        scan_init: how loud the scans begin. "silent": W_in and W_x with a standard deviation of 0.02 and beta 0, so
            that at first the states add some 1e-5 to d * V, and a short training learns without them. "unit": inputs of
            unit variance and beta 1, so that they add some tenths.
        device, dtype: of the parameters, as in torch.

    Shape: (B, H, W, C) and a hold mask (B, H, W) or None -> (B, H, W, C).

    Raises:
        ValueError: fewer channels than scales, a scale, d_state or dt_rank below 1, an unknown scan_init, or a hold
            mask of another shape.
        TypeError: a hold mask that is not bool.

    Source: SSMamba (arXiv:2604.15711), DMS, as this project reads it.
    """

    def __init__(
        self,
        dim: int,
        scales: tuple[int, ...] = (1, 2),
        d_state: int = 1,
        dt_rank: int | None = None,
        scan_init: str = "silent",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"DMS: dim is {dim}, expected at least 1")
        if not scales or min(scales) < 1 or len(scales) > dim:
            raise ValueError(f"DMS: scales is {scales}, expected 1 to {dim} factors (dim is {dim}), each at least 1")
        for name, value in (("d_state", d_state), ("dt_rank", dt_rank)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"DMS: {name} is {value}, expected a whole number of at least 1")
        if scan_init not in SCAN_INITS:
            raise ValueError(f"DMS: scan_init is {scan_init!r}, expected one of {', '.join(SCAN_INITS)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dt_rank = dt_rank or max(4, math.ceil(dim / 16))
        self.widths = [dim // len(scales)] * len(scales)
        self.widths[-1] += dim - sum(self.widths)
        self.in_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.act = nn.SiLU(inplace=True)
        self.scans = nn.ModuleList(
            DirectionalSSM(width, dt_rank, d_state, scale, scan_init, **dd) for width, scale in zip(self.widths, scales)
        )
        self.norm = LayerNorm(dim, **dd)
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        trunc_normal_(self.in_proj.weight, std=dim**-0.5 if scan_init == "unit" else 0.02)
        trunc_normal_(self.out_proj.weight, std=0.02)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, hold: Tensor | None = None) -> Tensor:
        if hold is not None and not torch.jit.is_scripting():
            _check_hold(hold, x)
        return self.out_proj(self.norm(torch.cat(self.scan(self.convolve(self.in_proj(x)), hold), dim=-1)))

    def convolve(self, x: Tensor) -> Tensor:
        """The scans' input from the projected one. Shape: (B, H, W, C) -> (B, H, W, C)."""
        return self.act(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)

    def scan(self, x: Tensor, hold: Tensor | None = None) -> list[Tensor]:
        """The scans' results, to be put beside each other. Shape: (B, H, W, C) -> one (B, H, W, C_i) per scale."""
        parts = torch.split(x, self.widths, dim=-1)
        out: list[Tensor] = []
        for i, scan in enumerate(self.scans):
            out.append(scan(parts[i], hold))
        return out
