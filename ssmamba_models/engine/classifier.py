"""A network with the loss of its supervised training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn


class Classifier(nn.Module):
    """Cross-entropy with label smoothing, class weights and mixup, over any timm model.

    Args:
        network: maps (B, 3, H, W) to (B, K) logits.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: (K,) weight of a tile's loss by its class, or None.
        mixup: of timm, with the same label smoothing, or None; its batches must be even.
        frozen: train the classifier layer alone; the encoder stays in eval mode.

    forward: {"image": (B, 3, H, W), "label": (B,) int64} -> {"loss": scalar, "accuracy": of the batch (left out under
        mixup)}. The loss is a plain mean over the tiles, so that parts of a batch average to the whole.

    Raises:
        ValueError: `frozen`, and the model has no classifier layer.
    """

    def __init__(
        self,
        network: nn.Module,
        label_smoothing: float = 0.1,
        class_weights: Tensor | None = None,
        mixup: Mixup | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.label_smoothing, self.mixup, self.frozen = network, label_smoothing, mixup, frozen
        self.register_buffer("class_weights", class_weights, persistent=False)
        if frozen:
            _freeze_encoder(network)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images, labels = batch["image"], batch["label"]
        if self.mixup is not None and self.training:
            images, targets = self.mixup(images, labels)
            logits = self.network(images).float()
            return {"loss": self._loss(logits, targets.float(), smoothing=0.0)}
        logits = self.network(images).float()
        hits = (logits.detach().argmax(dim=1) == labels).float()
        return {"loss": self._loss(logits, labels, self.label_smoothing), "accuracy": hits.mean()}

    def _loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        if self.class_weights is not None:
            soft = targets.is_floating_point()
            losses = losses * (targets @ self.class_weights if soft else self.class_weights[targets])
        return losses.mean()


def _freeze_encoder(network: nn.Module) -> None:
    classifier = network.get_classifier() if hasattr(network, "get_classifier") else None
    trained = set() if classifier is None else set(classifier.parameters())
    if not trained:
        raise ValueError(
            f"{type(network).__name__} has no classifier layer to train on a frozen encoder; leave out --freeze-encoder"
        )
    for parameter in network.parameters():
        parameter.requires_grad_(parameter in trained)


def inverse_frequencies(labels: Sequence[int], num_classes: int) -> Tensor:
    """Weights that make every class count the same, 1 on average over the tiles.

    Args:
        labels: class indices of the N tiles; every class occurs.

    Returns:
        (num_classes,) float32: N / (num_classes * number of tiles of the class).
    """
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes)
    return len(labels) / (num_classes * counts.float())
