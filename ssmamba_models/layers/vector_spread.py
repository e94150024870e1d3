"""How far the vectors of different samples are apart: what tells that self-supervision collapses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def vector_spread(vectors: Tensor) -> dict[str, Tensor]:
    """A falling rank and a cosine near 1 tell of collapse.

    Args:
        vectors: (B, C), one of each sample.

    Returns:
        feature_cosine: mean cosine between different vectors. feature_rank: effective rank of the centred vectors, exp
        of the entropy of the normalised singular values. Both are NaN where a vector is not finite.

    Source: effective rank: Roy and Vetterli (EUSIPCO 2007).
    """
    vectors = vectors.float()
    if not vectors.isfinite().all():
        # The decomposition would raise an error of its own, and hide that the training diverged.
        return dict.fromkeys(("feature_cosine", "feature_rank"), vectors.new_tensor(torch.nan))
    count = len(vectors)
    unit = F.normalize(vectors, dim=-1)
    cosine = (unit.sum(0).square().sum() - count) / max(count * (count - 1), 1)
    values = torch.linalg.svdvals(vectors - vectors.mean(0))
    share = values / values.sum().clamp_min(1e-12)
    return {"feature_cosine": cosine, "feature_rank": torch.special.entr(share).sum().exp()}
