"""Classifiers on PAMA: fine-tuned with the encoder, and linear on a frozen one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmamba_models.slide.aggregator import Aggregator, Output
from ssmamba_models.slide.pama import PAMA
from ssmamba_models.slide.tile_sample import front_places, pick_tiles, smallest


class PamaClassifier(Aggregator):
    """A linear classifier on the vector of a PAMA encoder, trained with it (fine-tuning).

    The "attention" is how much each tile reached the slide's vector by way of the anchors (see `PamaTokens`). Of slides
    with more than the encoder's `max_tiles`, as many are read: others at each training step, always the same in eval
    mode; those left out have attention 0. Published: cross-entropy, class-balanced sampling, 30 epochs.

    Args:
        encoder: the encoder; its weights are trained as well.
        num_classes: number of classes.
        drop_rate: share of the vector dropped in training.

    Shape: see `Aggregator`; coords are needed, in any unit.

    Raises:
        ValueError: no coords; otherwise as `Aggregator`.

    Source: PAMA (arXiv:2407.07504), sec. IV.
    """

    def __init__(self, encoder: PAMA, num_classes: int, drop_rate: float = 0.0) -> None:
        super().__init__(encoder.feature_dim, num_classes)
        self.encoder = encoder
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def pool(self, features: Tensor, coords: Tensor | None, mask: Tensor | None) -> Output:
        vectors, attention = self.read(features, coords, mask)
        return {"logits": self.head(self.drop(vectors)), "attention": attention}

    def read(self, features: Tensor, coords: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Vectors (B, E) and attention (B, N)."""
        if coords is None:
            raise ValueError(f"{type(self).__name__} needs coords, (B, N, 2): PAMA reads where the tiles lie")
        tiles, limit = features.shape[1], self.encoder.max_tiles
        if tiles <= limit:
            return self._read(features, coords, mask)
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        place, shown = front_places(smallest(self._noise(mask), mask, mask.sum(1).clamp(max=limit)))
        vectors, weights = self._read(pick_tiles(features, place), pick_tiles(coords, place), shown)
        return vectors, weights.new_zeros(mask.shape).scatter(1, place, weights)

    def _noise(self, mask: Tensor) -> Tensor:
        if self.training:
            return torch.rand(mask.shape, device=mask.device)
        # The same for a slide whatever stands beside it.
        return torch.rand(mask.shape[1], generator=torch.Generator().manual_seed(0)).to(mask.device).expand(mask.shape)

    def _read(self, features: Tensor, coords: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens = self.encoder.tokens(features, coords, mask)
        return self.encoder.norm(tokens.tiles[:, 0]), tokens.attention


class PamaLinearProbe(PamaClassifier):
    """A linear classifier on the vectors of a frozen PAMA encoder, normalised by batch statistics without affine.

    The encoder stays in eval mode, and gets no gradient. Training needs batches of two slides or more.

    Args:
        encoder: the encoder; its parameters are frozen.
        num_classes: number of classes.

    Shape, Source: as `PamaClassifier`.

    Raises:
        ValueError: a batch of one slide in training; otherwise as `PamaClassifier`.
    """

    def __init__(self, encoder: PAMA, num_classes: int) -> None:
        super().__init__(encoder, num_classes)
        encoder.requires_grad_(False).eval()
        self.norm = nn.BatchNorm1d(encoder.embed_dim, eps=1e-6, affine=False)
        nn.init.trunc_normal_(self.head.weight, std=0.01)

    def pool(self, features: Tensor, coords: Tensor | None, mask: Tensor | None) -> Output:
        if self.training and len(features) < 2:
            raise ValueError("a linear probe trains on batches of 2 slides or more: it normalises over the batch")
        with torch.no_grad():
            vectors, attention = self.read(features, coords, mask)
        return {"logits": self.head(self.norm(vectors)), "attention": attention}

    def train(self, mode: bool = True) -> PamaLinearProbe:
        """As of any module, but the encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self
