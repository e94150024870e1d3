"""Giga-SSL: learn slide vectors without labels, two views of a slide against all views of other slides."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmamba_models.layers.gather_rows import gather_rows, place_of_rows
from ssmamba_models.layers.vector_spread import vector_spread
from ssmamba_models.slide.batch_norm import RowBatchNorm
from ssmamba_models.slide.slide_encoder import SlideEncoder


class GigaSSL(nn.Module):
    """Contrastive learning of a slide encoder.

    The vector of each view goes through a projector (Linear, ReLU, BN twice, then Linear), and NT-Xent asks each
    projection for that of the other view of its slide among those of all views of the batch, over all processes.

    Args:
        encoder: any slide encoder.
        temperature: divides the cosines.
        hidden_dim: width of the projector. out_dim: length of what it gives.

    forward: a batch of what `GigaSSLViews` makes, stacked: features (B, 2, T, D), grid (B, 2, T, 2), by choice mask
        (B, 2, T) bool -> dict of scalars: loss and, detached, feature_cosine (mean cosine between the vectors of
        different slides' first views; 1 is collapse) and feature_rank (their effective rank, at most B).

    Raises:
        ValueError: an argument out of its range, a batch that does not fit, or of one slide in all.

    Source: Lazard et al., Giga-SSL (arXiv:2212.03273), section 3; NT-Xent: SimCLR (arXiv:2002.05709, eq. 1).
    """

    def __init__(
        self, encoder: SlideEncoder, temperature: float = 0.05, hidden_dim: int = 512, out_dim: int = 256
    ) -> None:
        super().__init__()
        # Written so that NaN, which YAML has too, fails it.
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected more than 0")
        for name, value in (("hidden_dim", hidden_dim), ("out_dim", out_dim)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        self.encoder, self.temperature = encoder, temperature
        self.projector = nn.Sequential(
            nn.Linear(encoder.embed_dim, hidden_dim),
            nn.ReLU(),
            RowBatchNorm(hidden_dim),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            RowBatchNorm(hidden_dim),
            nn.Linear(hidden_dim, out_dim),
        )

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        features, grid, mask = batch["features"], batch["grid"], batch.get("mask")
        if features.dim() != 4 or features.shape[1] != 2:
            raise ValueError(f"GigaSSL: features have shape {tuple(features.shape)}, expected (B, 2, T, D): two views")
        vectors = self.encoder(features.flatten(0, 1), grid.flatten(0, 1), None if mask is None else mask.flatten(0, 1))
        loss = nt_xent(self.projector(vectors), self.temperature)
        return {"loss": loss, **vector_spread(vectors[::2])}


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each view's partner by cosine similarity among all other views of all processes.

    Args:
        projections: (2 B, P); rows 2 i and 2 i + 1 are partners. B is the same on all processes.
        temperature: divides the cosines.

    Returns:
        A scalar: the mean over this process's rows.

    Raises:
        ValueError: there is one pair in all, and so nothing to choose from.

    Source: SimCLR (arXiv:2002.05709), eq. 1.
    """
    start, rows = place_of_rows(len(projections))
    if rows < 4:
        raise ValueError(
            f"a contrastive loss over {rows // 2} slide has nothing to choose from; use a larger --batch-size or fewer "
            "parts (--accumulate)"
        )
    own = torch.arange(len(projections), device=projections.device)
    # Products in bfloat16 would leave two digits of a cosine, which the temperature then magnifies.
    with torch.autocast(projections.device.type, enabled=False):
        unit = F.normalize(projections.float(), dim=-1)
        cosines = unit @ gather_rows(unit).T / temperature
        itself = F.one_hot(own + start, rows).bool()
        return F.cross_entropy(cosines.masked_fill(itself, -torch.inf), (own ^ 1) + start)
