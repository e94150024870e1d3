"""LPR, Local Perception Residual: the block's positional encoding and its eye for fine detail."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LPR(nn.Module):
    """x + DWConv3x3(x), un-normalised, on a channels-last map.

    A depthwise convolution with zero padding tells a token what lies around it and how far the border is: it encodes
    position, is translation invariant inside the map, and works at any size.

    Args:
        dim: width C.
        device, dtype: of the parameters, as in torch.

    Shape: (B, H, W, C) -> (B, H, W, C).

    Source: SSMamba (arXiv:2604.15711), LPR; the form is CMT's local perception unit (arXiv:2107.06263, eq. 2).
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        # The residual is one more weight of 1 at the kernel's centre: no second pass over the map.
        weight = self.conv.weight
        weight = weight + F.pad(torch.ones_like(weight[:1, :1, :1, :1]), (1, 1, 1, 1))
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, self.conv.bias, padding=1, groups=self.conv.groups)
        return y.permute(0, 2, 3, 1)
