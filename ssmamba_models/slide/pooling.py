"""Mean and max pooling: the baselines that any aggregator should beat."""

from __future__ import annotations

from torch import Tensor, nn

from ssmamba_models.slide.aggregator import Aggregator, Output, masked_softmax


class MeanPooling(Aggregator):
    """A linear classifier on the mean of the tiles' features.

    The logits are the mean of what the classifier says of each tile; the "attention" is the softmax over the tiles of
    its logit for the predicted class: which tiles speak for it.

    Args:
        feature_dim: D.
        num_classes: number of classes.
        dropout: share of the mean feature's channels dropped in training.
    """

    def __init__(self, feature_dim: int, num_classes: int, dropout: float = 0.25) -> None:
        super().__init__(feature_dim, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(feature_dim, num_classes)

    def pool(self, features: Tensor, coords: Tensor | None, mask: Tensor | None) -> Output:
        # Padding is 0 already.
        counts = features.shape[1] if mask is None else mask.sum(dim=1, keepdim=True)
        logits = self.classifier(self.dropout(features.sum(dim=1) / counts))
        return {"logits": logits, "attention": _speaking_for(logits, self.classifier(features), mask)}


class MaxPooling(Aggregator):
    """Each tile is classified alone; a slide is what its most telling tile is, class by class.

    Tiles go through Linear D to `hidden_dim`, ReLU, dropout and a linear classifier. The "attention" is the softmax
    over the tiles of their logits for the predicted class.

    Args:
        feature_dim: D.
        num_classes: number of classes.
        hidden_dim: width between the layers.
        dropout: share of the channels dropped between them in training.
    """

    def __init__(self, feature_dim: int, num_classes: int, hidden_dim: int = 512, dropout: float = 0.25) -> None:
        super().__init__(feature_dim, num_classes)
        self.classifier = nn.Sequential(
            nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, num_classes)
        )

    def pool(self, features: Tensor, coords: Tensor | None, mask: Tensor | None) -> Output:
        tiles = self.classifier(features)
        if mask is not None:
            tiles = tiles.masked_fill(~mask[..., None], -float("inf"))
        logits = tiles.amax(dim=1)
        return {"logits": logits, "attention": _speaking_for(logits, tiles, mask)}


def _speaking_for(logits: Tensor, tiles: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax over tiles of their logits (B, N, K) for the class that each bag's logits (B, K) predict."""
    predicted = logits.argmax(dim=1)[:, None, None].expand(-1, tiles.shape[1], 1)
    return masked_softmax(tiles.detach().gather(2, predicted)[..., 0].float(), mask)
