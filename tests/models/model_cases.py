"""The smallest model and images for it."""

from __future__ import annotations

from typing import Any

import timm
import torch


def small(seed: int = 0, **kwargs: Any) -> torch.nn.Module:
    """test_ssmamba with fixed random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return timm.create_model("test_ssmamba", **kwargs).eval()


def image(*size: int, chans: int = 3, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, chans, *(size or (64, 64)), generator=torch.Generator().manual_seed(seed))
