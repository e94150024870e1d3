"""torchmil's aggregators as ours: any number of classes, one bag at a time, a weight for each tile.

torchmil's models give one logit. Their last layer is replaced by one of `num_classes` outputs; all else is theirs.
Before them stands Linear D to `hidden_dim`, ReLU and dropout, as in CLAM.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmamba_models.slide.aggregator import BagAggregator, Output, weighted_cross_entropy
from ssmamba_models.slide.tile_order import neighbour_graph


def require_torchmil() -> ModuleType:
    """Import torchmil's models.

    Raises:
        ImportError: torchmil is missing or broken; the message names the extra that installs it.
    """
    try:
        from torchmil import models
    except ImportError as error:
        raise ImportError(
            f'this aggregator needs torchmil ({error}); install it with: pip install "ssmamba-models[mil]", '
            "or choose mambamil, mean or max"
        ) from error
    return models


class TorchmilAggregator(BagAggregator):
    """Base of the aggregators below: the layer before torchmil's model."""

    def __init__(self, feature_dim: int, num_classes: int, hidden_dim: int, dropout: float) -> None:
        super().__init__(feature_dim, num_classes)
        self.embed = nn.Sequential(nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout))


class ABMIL(TorchmilAggregator):
    """Attention pooling; the "attention" is the weight of each tile in the sum.

    Args:
        feature_dim, num_classes: see `Aggregator`.
        hidden_dim: width after the first layer.
        attention_dim: width of the attention.
        gated: multiply it with a learned gate.
        dropout: share of the channels dropped after the first layer, in training.

    Raises:
        ImportError: torchmil is missing; so for all aggregators of this file.

    Source: Ilse et al. (arXiv:1802.04712), by torchmil.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        hidden_dim: int = 512,
        attention_dim: int = 128,
        gated: bool = True,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(feature_dim, num_classes, hidden_dim, dropout)
        self.model = require_torchmil().ABMIL((hidden_dim,), att_dim=attention_dim, gated=gated)
        self.model.classifier = nn.Linear(hidden_dim, num_classes)

    def pool_bag(self, features: Tensor, coords: Tensor | None) -> Output:
        logits, scores = self.model(self.embed(features)[None], return_att=True)
        return {"logits": logits, "attention": scores[0].float().softmax(dim=0)}


class _SmoothTopOneSVM(nn.Module):
    """Smooth top-1 SVM loss, margin and temperature 1: the cross-entropy of logits of which the wrong ones gain 1.

    torchmil 1.0.2's own sums over the tiles where it should over the classes.

    Shape: logits (n, 2) and targets (n, 1) -> scalar, the mean.

    Source: Berrada et al. (arXiv:1802.07595), equation 9 with k = 1.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets[:, 0].long()
        return F.cross_entropy(logits + 1 - F.one_hot(targets, logits.shape[1]), targets)


class CLAM(TorchmilAggregator):
    """CLAM-SB: attention pooling, with tiles of high and low attention told apart in training.

    The loss is ``bag_weight CE + (1 - bag_weight) (in + mean of out)``: `in` asks the classifier of the slide's class
    to tell the `k_sample` tiles of highest attention from those of lowest, `out` asks the other classes' to say no to
    the highest. The "attention" is the weight of each tile in the sum.

    Args:
        feature_dim, num_classes, hidden_dim, attention_dim, gated, dropout: as for `ABMIL`.
        k_sample: tiles on either side.
        bag_weight: share of the bag's own loss.

    Source: Lu et al. (arXiv:2004.09666), by torchmil; with more than two classes as the paper's subtyping.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        hidden_dim: int = 512,
        attention_dim: int = 128,
        gated: bool = True,
        dropout: float = 0.25,
        k_sample: int = 8,
        bag_weight: float = 0.7,
    ) -> None:
        super().__init__(feature_dim, num_classes, hidden_dim, dropout)
        if not 0 <= bag_weight <= 1:
            raise ValueError(f"CLAM: bag_weight is {bag_weight}, expected 0 to 1")
        self.bag_weight = bag_weight
        self.model = require_torchmil().CLAM_SB(
            (hidden_dim,), att_dim=attention_dim, k_sample=k_sample, gated=gated
        )
        self.model.classifier = nn.Linear(hidden_dim, num_classes)
        self.model.inst_loss_fn = _SmoothTopOneSVM()
        self.model.inst_classifiers = nn.ModuleList(nn.Linear(hidden_dim, 2) for _ in range(num_classes))

    def pool_bag(self, features: Tensor, coords: Tensor | None) -> Output:
        logits, scores, tiles = self.model(self.embed(features)[None], return_att=True, return_emb=True)
        return {"logits": logits, "attention": scores[0].float().softmax(dim=0), "tiles": (scores[0], tiles[0])}

    def loss(self, output: Output, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        bag = super().loss(output, labels, class_weights)
        pairs = zip(output["tiles"], labels)
        losses = [self._tile_loss(scores, tiles, int(label)) for (scores, tiles), label in pairs]
        return self.bag_weight * bag + (1 - self.bag_weight) * torch.stack(losses).mean()

    def _tile_loss(self, scores: Tensor, tiles: Tensor, label: int) -> Tensor:
        inside, _, _ = self.model.inst_eval(scores, tiles, self.model.inst_classifiers[label])
        others = [place for place in range(self.num_classes) if place != label]
        outside = [self.model.inst_eval_out(scores, tiles, self.model.inst_classifiers[place])[0] for place in others]
        return inside + torch.stack(outside).mean()


class _PerClass(nn.Module):
    """A weight vector for each class: (B, K, H) -> (B, K, 1)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        one = nn.Linear(width, classes)
        self.weight, self.bias = one.weight, one.bias

    def forward(self, z: Tensor) -> Tensor:
        return (z * self.weight).sum(dim=-1, keepdim=True) + self.bias[:, None]


class DSMIL(TorchmilAggregator):
    """Two streams: the most telling tile of each class, and a sum of the tiles by their likeness to it.

    The logits are the mean of both streams, the loss the mean of their cross-entropies. The "attention" is the second
    stream's weights for the predicted class.

    Args:
        feature_dim, num_classes, hidden_dim, attention_dim, dropout: as for `ABMIL`.

    Source: Li et al. (arXiv:2011.08939), by torchmil; one most telling tile per class, as in the paper.
    """

    def __init__(
        self, feature_dim: int, num_classes: int, hidden_dim: int = 512, attention_dim: int = 128, dropout: float = 0.25
    ) -> None:
        super().__init__(feature_dim, num_classes, hidden_dim, dropout)
        self.model = require_torchmil().DSMIL((hidden_dim,), att_dim=attention_dim)
        self.model.inst_classifier = nn.Linear(hidden_dim, num_classes)
        self.model.bag_classifier = _PerClass(hidden_dim, num_classes)

    def pool_bag(self, features: Tensor, coords: Tensor | None) -> Output:
        bag, weights, tiles = self.model(self.embed(features)[None], return_att=True, return_inst_pred=True)
        best = tiles.amax(dim=1)
        logits = (bag + best) / 2
        attention = weights[0, :, int(logits.argmax())].float()
        return {"logits": logits, "attention": attention, "streams": (bag, best)}

    def loss(self, output: Output, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        bag, best = (torch.cat(stream) for stream in zip(*output["streams"]))
        first, second = (weighted_cross_entropy(stream, labels, class_weights) for stream in (bag, best))
        return (first + second) / 2


class TransformerABMIL(TorchmilAggregator):
    """Transformer layers over all tiles, then attention pooling; time grows with the square of the tiles.

    Memory does not, since torch's attention never holds the whole matrix. The "attention" is the pooling's.

    Args:
        feature_dim, num_classes, hidden_dim, attention_dim, gated, dropout: as for `ABMIL`.
        depth: number of layers.
        heads: heads of each; they divide hidden_dim.

    Source: Castro-Macías et al. (arXiv:2410.03276), by torchmil.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        hidden_dim: int = 512,
        attention_dim: int = 128,
        gated: bool = True,
        depth: int = 1,
        heads: int = 8,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(feature_dim, num_classes, hidden_dim, dropout)
        check_heads("transformer_abmil", hidden_dim, heads)
        self.model = require_torchmil().TransformerABMIL(
            (hidden_dim,),
            pool_att_dim=attention_dim,
            pool_gated=gated,
            transf_att_dim=hidden_dim,
            transf_n_layers=depth,
            transf_n_heads=heads,
        )
        self.model.last_layer = nn.Linear(hidden_dim, num_classes)

    def pool_bag(self, features: Tensor, coords: Tensor | None) -> Output:
        logits, scores = self.model(self.embed(features)[None], return_att=True)
        return {"logits": logits, "attention": scores[0].float().softmax(dim=0)}


class SmABMIL(TorchmilAggregator):
    """Attention pooling over features that are smoothed among neighbouring tiles; needs coords.

    The "attention" is the pooling's.

    Args:
        feature_dim, num_classes, hidden_dim, attention_dim, dropout: as for `ABMIL`.
        steps: steps of the smoothing.

    Raises:
        ValueError: called without coords.

    Source: Castro-Macías et al. (arXiv:2410.03276), by torchmil, over the graph of the eight neighbours.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        hidden_dim: int = 512,
        attention_dim: int = 128,
        steps: int = 10,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(feature_dim, num_classes, hidden_dim, dropout)
        self.model = require_torchmil().SmABMIL((hidden_dim,), att_dim=attention_dim, sm_steps=steps)
        self.model.last_layer = nn.Linear(hidden_dim, num_classes)

    def pool_bag(self, features: Tensor, coords: Tensor | None) -> Output:
        logits, scores = _run_on_graph(self.model, self.embed(features), _graph("smabmil", coords))
        return {"logits": logits, "attention": scores[0].float().softmax(dim=0)}


class PatchGCN(TorchmilAggregator):
    """Graph convolutions among neighbouring tiles, then attention pooling; needs coords.

    The "attention" is the pooling's.

    Args:
        feature_dim, num_classes, hidden_dim, attention_dim, dropout: as for `ABMIL`.
        depth: number of graph convolutions.

    Raises:
        ValueError: called without coords.

    Source: Chen et al. (arXiv:2107.13048), by torchmil, over the graph of the eight neighbours.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        hidden_dim: int = 256,
        attention_dim: int = 128,
        depth: int = 3,
        dropout: float = 0.25,
    ) -> None:
        super().__init__(feature_dim, num_classes, hidden_dim, dropout)
        self.model = require_torchmil().PatchGCN(
            (hidden_dim,), n_gcn_layers=depth, mlp_depth=1, hidden_dim=hidden_dim, att_dim=attention_dim
        )
        self.model.classifier = nn.Linear(hidden_dim, num_classes)

    def pool_bag(self, features: Tensor, coords: Tensor | None) -> Output:
        logits, scores = _run_on_graph(self.model, self.embed(features), _graph("patchgcn", coords))
        return {"logits": logits, "attention": scores[0].float().softmax(dim=0)}


def _graph(name: str, coords: Tensor | None) -> Tensor:
    if coords is None:
        raise ValueError(f"aggregator {name!r} needs the tiles' coords: it looks at neighbours")
    return neighbour_graph(coords)


def _run_on_graph(model: nn.Module, tiles: Tensor, graph: Tensor) -> tuple[Tensor, Tensor]:
    """torchmil's logits (1, num_classes) and scores (1, n) of one bag (n, hidden_dim), in float32 under autocast too.

    Autocast would make the product with the sparse graph a bfloat16 one, which torch does not have.
    """
    with torch.autocast(tiles.device.type, enabled=False):
        return model(tiles.float()[None], graph, return_att=True)


def check_heads(name: str, width: int, heads: int) -> None:
    """Raise ValueError unless so many heads divide a width."""
    if heads < 1 or width % heads:
        raise ValueError(f"aggregator {name!r}: {heads} heads do not divide hidden_dim {width}")
