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
    """A linear classifier on the largest value that each channel takes among the tiles.

    Tiles go through Linear D to `hidden_dim`, ReLU and dropout first. The "attention" is each tile's share of what
    speaks for the predicted class: of the channels in which it has the largest value.

    Args:
        feature_dim: D.
        num_classes: number of classes.
        hidden_dim: width of the channels.
        dropout: share of them dropped in training.
    """

    def __init__(self, feature_dim: int, num_classes: int, hidden_dim: int = 512, dropout: float = 0.25) -> None:
        super().__init__(feature_dim, num_classes)
        self.embed = nn.Sequential(nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(hidden_dim, num_classes)

    def pool(self, features: Tensor, coords: Tensor | None, mask: Tensor | None) -> Output:
        tiles = self.embed(features)
        if mask is not None:
            tiles = tiles.masked_fill(~mask[..., None], -1)  # below what ReLU gives
        largest, place = tiles.max(dim=1)
        logits = self.classifier(largest)
        return {"logits": logits, "attention": self._shares(logits.detach(), largest.detach(), place, mask, tiles)}

    def _shares(self, logits: Tensor, largest: Tensor, place: Tensor, mask: Tensor | None, tiles: Tensor) -> Tensor:
        speaking = (self.classifier.weight.detach()[logits.argmax(dim=1)] * largest).clamp(min=0).float()
        # A little for every tile: where no channel speaks for the class, all count the same.
        shares = speaking.new_full(tiles.shape[:2], 1e-9)
        if mask is not None:
            shares = shares * mask
        shares = shares.scatter_add(1, place, speaking)
        return shares / shares.sum(dim=1, keepdim=True)


def _speaking_for(logits: Tensor, tiles: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax over tiles of their logits (B, N, K) for the class that each bag's logits (B, K) predict."""
    predicted = logits.argmax(dim=1)[:, None, None].expand(-1, tiles.shape[1], 1)
    return masked_softmax(tiles.detach().gather(2, predicted)[..., 0].float(), mask)
