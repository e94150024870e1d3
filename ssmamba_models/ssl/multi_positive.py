"""InfoNCE with several positives, of which the doubtful ones pull less."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MultiPositiveInfoNCE(nn.Module):
    """How hard it is to tell a set of positives from negatives, for each of B queries::

        -log( sum_P e^(s / t) / (sum_P e^(s / t) + sum_N e^(s / t)) )

    The sum stands inside the logarithm: a positive's gradient is in proportion to its share e^(s/t) / sum_P e^(s/t), so
    one that is unlike the query, and so doubtful, is hardly pulled. With one positive it is InfoNCE.

    Args:
        temperature: t.

    Raises:
        ValueError: a temperature that is not above 0.

    Source: SGCL (Lin et al., Medical Image Analysis 89, 102845, 2023), spatial loss; InfoNCE: arXiv:1807.03748, eq. 4.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected more than 0")
        self.temperature = temperature

    def forward(
        self,
        positive: Tensor,
        negative: Tensor,
        positive_valid: Tensor | None = None,
        negative_valid: Tensor | None = None,
    ) -> Tensor:
        """The loss of each query.

        Args:
            positive: (B, P) similarities to its positives.
            negative: (B, K) similarities to its negatives.
            positive_valid, negative_valid: (B, P) and (B, K) bool, which of them count; None: all.

        Returns:
            (B,) float32; 0 for a query without a positive.
        """
        own = _logits(positive, positive_valid, self.temperature)
        others = _logits(negative, negative_valid, self.temperature)
        found = torch.isfinite(own).any(1)
        # A row of -inf alone has no gradient, not even zero.
        own = torch.where(found[:, None], own, 0.0)
        loss = torch.logsumexp(torch.cat([own, others], dim=1), dim=1) - torch.logsumexp(own, dim=1)
        return torch.where(found, loss, 0.0)


def _logits(similarities: Tensor, valid: Tensor | None, temperature: float) -> Tensor:
    logits = similarities.float() / temperature
    return logits if valid is None else logits.masked_fill(~valid, -torch.inf)
