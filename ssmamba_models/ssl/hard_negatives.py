"""Negatives that are hard, but not the hardest, which may well be positives that nobody named."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ssmamba_models.ssl.nearest_rows import LARGEST_BLOCK


class BetaHardNegativeSampler(nn.Module):
    """Draws tiles that are like a query's, by a Beta density over their ranks.

    All tiles but the query's own and its positives are ranked by the similarity of their encoder features. Of the first
    `share` of them `count` are drawn, with replacement: a rank is Beta(alpha, beta) stretched over that range.
    Beta(5, 15) has its mean at a quarter of the range and hardly reaches its two ends. The ranks are drawn once for a
    step; each query has other tiles at them.

    Memory: at most two blocks of 2**25 similarities or one query's N, whichever is larger. Time: B * N * D
    multiplications, and a selection of the first ranks of each query.

    Args:
        size: N, the number of tiles.
        share: of the ranking that is drawn from, above 0 and at most 1.
        count: tiles to draw; None takes 4096, or all that the share holds where there are fewer.
        alpha, beta: of the density.

    Raises:
        ValueError: an argument out of its range, or a `count` of more tiles than there are.

    Source: SGCL (Lin et al., Medical Image Analysis 89, 102845, 2023), semi-hard negatives.
    """

    def __init__(
        self, size: int, share: float = 0.2, count: int | None = None, alpha: float = 5.0, beta: float = 15.0
    ) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"hard_share is {share}, expected a number above 0 and at most 1")
        if not (alpha > 0 and beta > 0):
            raise ValueError(f"the density of hard negatives is Beta({alpha}, {beta}), expected two numbers above 0")
        check_count("hard_negatives", count, size)
        self.size, self.share, self.alpha, self.beta = size, share, alpha, beta
        self.count = max(1, min(4096, int(share * size))) if count is None else count

    @torch.no_grad()
    def sample(
        self,
        queries: Tensor,
        bank: Tensor,
        excluded: Tensor,
        excluded_valid: Tensor,
        generator: np.random.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Draw hard negatives.

        Args:
            queries: (B, E) encoder features, unit vectors.
            bank: (N, E) those of all tiles.
            excluded: (B, W) int64, tiles that are no negatives: the query's own and its positives, none of them twice.
            excluded_valid: (B, W) bool, which of them count.
            generator: draws the ranks, and nothing else decides them.

        Returns:
            (B, count) int64, tiles, and (B, 1) bool: False where all tiles are excluded, and so none is drawn.
        """
        places = torch.from_numpy(generator.beta(self.alpha, self.beta, self.count)).to(queries.device)
        left = self.size - excluded_valid.sum(1)
        reach = (self.share * left).long().clamp_min(1)
        ranks = torch.minimum((places * reach[:, None]).long(), reach[:, None] - 1)
        rows = max(1, LARGEST_BLOCK // self.size)
        drawn = [
            _at_ranks(some, out, valid, at, bank)
            for some, out, valid, at in zip(*(x.split(rows) for x in (queries, excluded, excluded_valid, ranks)))
        ]
        return torch.cat(drawn), (left > 0)[:, None]


def _at_ranks(queries: Tensor, excluded: Tensor, excluded_valid: Tensor, ranks: Tensor, bank: Tensor) -> Tensor:
    similarity = queries @ bank.T
    hidden = torch.where(excluded_valid, -torch.inf, similarity.gather(1, excluded))
    # What does not count may name a tile that does not count twice: the least of all that is written must win.
    similarity.scatter_reduce_(1, excluded, hidden, "amin")
    # No rank beyond the last one drawn need be sorted.
    first = similarity.topk(min(int(ranks.max()) + 1, similarity.shape[1]), dim=1).indices
    return first.gather(1, ranks)


def check_count(name: str, count: int | None, size: int) -> None:
    """Refuse to draw more tiles than there are, or none (None: the default, which adapts)."""
    if count is not None and not 1 <= count <= size:
        raise ValueError(
            f"{name} is {count}, but there are {size} tiles; expected from 1 to {size}, or none given, which takes "
            "what fits"
        )
