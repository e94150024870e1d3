"""What every aggregator is: tile features of a slide in, logits and a weight for each tile out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Output = dict[str, Any]


class Aggregator(nn.Module):
    """Base of the models that turn the tiles of a slide into a prediction (multiple-instance learning).

    Subclasses implement `pool`; calling one gives a dict:

    - "logits": (B, num_classes).
    - "attention": (B, N), how much each tile counts; 0 or more, 0 at padding, sum 1 over each bag. What it is made of,
      each aggregator's docstring says.

    Args:
        feature_dim: D, the length of a tile's feature.
        num_classes: number of classes, 2 or more.

    Shape: features (B, N, D); coords (B, N, 2), level-0 pixels (x, y) of the tiles, or None; mask (B, N) bool, False at
    padding, or None. Padding and what stands in it change nothing.

    Raises:
        ValueError: fewer than two classes, a shape that does not fit, or a bag without a tile.
        TypeError: a mask that is not bool.
    """

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        if feature_dim < 1:
            raise ValueError(f"feature_dim is {feature_dim}, expected 1 or more")
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, expected 2 or more (two for yes and no)")
        self.feature_dim, self.num_classes = feature_dim, num_classes

    def forward(self, features: Tensor, coords: Tensor | None = None, mask: Tensor | None = None) -> Output:
        """Predict each bag, and weigh its tiles (see the class)."""
        self._check(features, coords, mask)
        if mask is not None:
            # 0 times what stands in the padding could still be NaN.
            features = features.masked_fill(~mask[..., None], 0)
        return self.pool(features, coords, mask)

    def pool(self, features: Tensor, coords: Tensor | None, mask: Tensor | None) -> Output:
        """What `forward` gives, for inputs that are checked; may add what `loss` needs."""
        raise NotImplementedError

    def rebuild_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `create_aggregator` takes to make it again, from the arguments given to it and from no file."""
        return dict(given)

    def loss(self, output: Output, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """What training minimises: the mean over bags of the cross-entropy, and what an aggregator adds of its own.

        Args:
            output: of `forward`.
            labels: (B,) int64 classes.
            class_weights: (num_classes,) factors on the loss of each class, or None.
        """
        return weighted_cross_entropy(output["logits"], labels, class_weights)

    def _check(self, features: Tensor, coords: Tensor | None, mask: Tensor | None) -> None:
        name, width = type(self).__name__, self.feature_dim
        if features.dim() != 3 or features.shape[2] != width:
            raise ValueError(f"{name}: features have shape {tuple(features.shape)}, expected (B, N, {width})")
        tiles = tuple(features.shape[:2])
        if coords is not None and tuple(coords.shape) != (*tiles, 2):
            raise ValueError(f"{name}: coords have shape {tuple(coords.shape)}, expected (B, N, 2) = {(*tiles, 2)}")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"{name}: mask must be a bool tensor, not {mask.dtype}; compare or cast it with .bool()")
        if mask is not None and tuple(mask.shape) != tiles:
            raise ValueError(f"{name}: mask has shape {tuple(mask.shape)}, expected (B, N) = {tiles}")
        if tiles[1] == 0 or (mask is not None and not mask.any(dim=1).all()):
            raise ValueError(f"{name}: a bag without tiles; leave such slides out")


class BagAggregator(Aggregator):
    """An aggregator that is asked for one bag at a time, without padding: subclasses implement `pool_bag`."""

    def pool(self, features: Tensor, coords: Tensor | None, mask: Tensor | None) -> Output:
        bags = []
        for b in range(len(features)):
            keep = slice(None) if mask is None else mask[b]
            bags.append(self.pool_bag(features[b][keep], None if coords is None else coords[b][keep]))
        outputs = {name: [bag[name] for bag in bags] for name in bags[0]}
        return outputs | {
            "logits": torch.cat(outputs["logits"]),
            "attention": _spread(outputs["attention"], mask),
        }

    def pool_bag(self, features: Tensor, coords: Tensor | None) -> Output:
        """One bag, (n, D) and (n, 2) -> "logits" (1, num_classes), "attention" (n,), and what `loss` wants of a bag."""
        raise NotImplementedError


def _spread(weights: list[Tensor], mask: Tensor | None) -> Tensor:
    """The weights of each bag's tiles, put where its mask is True."""
    if mask is None:
        return torch.stack(weights)
    spread = weights[0].new_zeros(mask.shape)
    spread[mask] = torch.cat(weights)
    return spread


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the tiles of each bag, (B, N) -> (B, N); 0 at padding."""
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=1)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The mean over bags of weight times cross-entropy: unlike torch's, not divided by the weights of the batch.

    Bags come one at a time, and a division by the one bag's weight would undo it.
    """
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    return each.mean() if class_weights is None else (class_weights[labels] * each).mean()
