"""MambaMIL: the tiles of a slide as sequences, read in both directions, row by row and column by column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmamba_models.layers.mamba import Mamba
from ssmamba_models.slide.aggregator import Aggregator, Output, masked_softmax
from ssmamba_models.slide.tile_order import scan_order


class BidirectionalMamba(nn.Module):
    """x + the mean of what two Mambas, one per direction, make of LayerNorm(x) in each of several orders.

    The two Mambas serve all orders: a slide has no upright, so columns mean what rows do.

    Args:
        dim: width C.
        checkpoint_above: sequences longer than this are read once more in the backward pass, one order and direction
            at a time, instead of being kept: their memory is that of one reading.
        **mamba: further arguments of `Mamba`.

    Shape: x (B, N, C), orders a list of (B, N) places, mask (B, N) bool or None -> (B, N, C). In each order padding
    must come last.
    """

    def __init__(
        self,
        dim: int,
        checkpoint_above: int = 8192,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mamba: Any,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.checkpoint_above = checkpoint_above
        self.norm = nn.LayerNorm(dim, **dd)
        self.forwards = Mamba(dim, **mamba, **dd)
        self.backwards = Mamba(dim, **mamba, **dd)

    def forward(self, x: Tensor, orders: list[Tensor], mask: Tensor | None = None) -> Tensor:
        again = self.training and torch.is_grad_enabled() and x.shape[1] > self.checkpoint_above
        normed, total = self.norm(x), torch.zeros_like(x)
        for order in orders:
            for mamba, place in ((self.forwards, order), (self.backwards, order.flip(1))):
                arguments = (mamba, normed, place, mask)
                total = total + (checkpoint(_read, *arguments, use_reentrant=False) if again else _read(*arguments))
        return x + total / (2 * len(orders))


def _read(mamba: Mamba, x: Tensor, order: Tensor, mask: Tensor | None) -> Tensor:
    """What a Mamba makes of x (B, N, C) read in an order (B, N), put back where its tiles were."""
    place = order[..., None].expand_as(x)
    y = mamba(x.gather(1, place), None if mask is None else mask.gather(1, order))
    return torch.zeros_like(y).scatter(1, place, y)


class MambaMIL(Aggregator):
    """Bidirectional Mamba blocks over the tiles of a slide, attention pooling and a linear classifier.

    Linear D to `dim`; `depth` blocks of `BidirectionalMamba`, each over the tiles row by row and column by column; the
    bag is the sum of a_i LN(x_i), with a = softmax(w^T tanh(V LN(x_i))), which is the "attention". Time and memory grow
    with the number of tiles, not with its square: at 100,000 tiles, 13 arrays of (tiles, dim) float32 to predict and 23
    to train were measured. Without coords the tiles are read in the order given, alone.

    Args:
        feature_dim: D.
        num_classes: number of classes.
        dim: width of the blocks.
        depth: number of blocks.
        d_state, expand: of `Mamba`; expand is 1 where Mamba has 2, since slides are few, and tiles many.
        attention_dim: width of the attention.
        dropout: share of the channels dropped after the first layer, in training.
        checkpoint_above: bags with more tiles are trained with less memory and more time (see `BidirectionalMamba`).

    Shape: see `Aggregator`.

    Source: of the kind of Yang et al., MambaMIL (arXiv:2403.06800), which too scans a reordered sequence; pooling by
    Ilse et al. (arXiv:1802.04712), equation 8.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        dim: int = 512,
        depth: int = 2,
        d_state: int = 16,
        expand: int = 1,
        attention_dim: int = 128,
        dropout: float = 0.25,
        checkpoint_above: int = 8192,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(feature_dim, num_classes)
        dd = {"device": device, "dtype": dtype}
        self.embed = nn.Sequential(nn.Linear(feature_dim, dim, **dd), nn.Dropout(dropout))
        self.blocks = nn.ModuleList(
            BidirectionalMamba(dim, checkpoint_above, d_state=d_state, expand=expand, **dd) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, **dd)
        self.attention = nn.Sequential(
            nn.Linear(dim, attention_dim, **dd), nn.Tanh(), nn.Linear(attention_dim, 1, bias=False, **dd)
        )
        self.classifier = nn.Linear(dim, num_classes, **dd)

    def pool(self, features: Tensor, coords: Tensor | None, mask: Tensor | None) -> Output:
        orders = _orders(features, coords, mask)
        x = self.embed(features)
        for block in self.blocks:
            x = block(x, orders, mask)
        x = self.norm(x)
        weights = masked_softmax(self.attention(x)[..., 0].float(), mask)
        bag = torch.einsum("bn,bnc->bc", weights.to(x.dtype), x)
        return {"logits": self.classifier(bag), "attention": weights}


def _orders(features: Tensor, coords: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    if coords is not None:
        return [scan_order(coords, mask, transposed) for transposed in (False, True)]
    if mask is None:
        return [torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])]
    return [(~mask).byte().argsort(dim=1, stable=True)]
