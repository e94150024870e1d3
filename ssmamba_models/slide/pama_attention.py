"""PACA, PAMA's position-aware cross-attention between a slide's tiles and its anchors, with reorientation (KRO)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from ssmamba_models.slide.pama_geometry import DISTANCE_BINS


@dataclass(frozen=True)
class PamaPosition:
    """Where L tokens (the class token, and tiles) stand, seen from K anchors.

    Attributes:
        distance: (B, K, L) int64 bins.
        sectors: (B, K, L, R) float32, one-hot; 0 where a token has no direction, and at padding.
        mask: (B, L) bool, False at padding.
        anchor_mask: (B, K) bool, False at padding, and for anchors that are dropped.
    """

    distance: Tensor
    sectors: Tensor
    mask: Tensor
    anchor_mask: Tensor


def one_hot_sectors(polar: Tensor, mask: Tensor, polar_bins: int) -> Tensor:
    """Sectors (B, K, L), R where there is none, and mask (B, L) -> (B, K, L, R) float32, 0 without sector and at
    padding."""
    hot = F.one_hot(polar.long(), polar_bins + 1)[..., :polar_bins]
    return (hot * mask[:, None, :, None]).float()


class PACA(nn.Module):
    """Position-aware cross-attention: anchors read the tiles, tiles read the anchors; tiles do not read tiles.

    Per head, with one W_qkv and W_o for both, and scores S = Q_A K_X^T / sqrt(d)::

        anchors: W_o softmax_tiles(S + bias) V_X
        tiles:   W_o softmax_anchors(Q_X K_A^T / sqrt(d) + bias^T) V_A
        bias = E_dist[distance] + E_polar[(sector - m) mod R]

    where m, of each head and anchor, is the sector with the largest sum of |S| (kernel reorientation, KRO): anchors
    count their sectors from where they look, and turning the slide does not matter. No gradient goes through m.

    Args:
        dim: width C.
        num_heads: heads; they divide C.
        polar_bins: R.
        kro: whether sectors are reoriented; m is 0 otherwise.
        shared_polar: whether all heads share one E_polar, as the published code has it.
        proj_drop: share of the outputs dropped in training.

    Shape: tiles (B, L, C), anchors (B, K, C) -> the same as a pair; and how much each tile counted anchors,
    (B, H, L, K), and each anchor tiles, (B, H, K, L), float32: rows sum to 1. Time and memory grow with K * L.

    Source: PAMA (arXiv:2407.07504), sec. III-B.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        polar_bins: int = 8,
        kro: bool = True,
        shared_polar: bool = False,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, expected a divisor of the width {dim}")
        self.num_heads, self.kro, self.scale = num_heads, kro, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        # Bins 0..64; published checkpoints have one row more.
        self.distance_embed = nn.Embedding.from_pretrained(_near_first(num_heads), freeze=False)
        self.polar_embed = nn.Embedding(polar_bins, 1 if shared_polar else num_heads)

    def forward(
        self, tiles: Tensor, anchors: Tensor, position: PamaPosition
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        tile_q, tile_k, tile_v = self._heads(tiles)
        anchor_q, anchor_k, anchor_v = self._heads(anchors)
        scores = (anchor_q @ tile_k.transpose(-1, -2)).float() * self.scale
        bias = self._bias(scores, position)
        by_anchor = _masked_softmax(scores + bias, position.mask)
        scores = (tile_q @ anchor_k.transpose(-1, -2)).float() * self.scale
        by_tile = _masked_softmax(scores + bias.transpose(-1, -2), position.anchor_mask)
        return (self._gather(by_tile, anchor_v), self._gather(by_anchor, tile_v)), (by_tile, by_anchor)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, n, C) -> queries, keys and values, (B, H, n, d) each."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _gather(self, weights: Tensor, values: Tensor) -> Tensor:
        return self.proj_drop(self.proj((weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)))

    def _bias(self, scores: Tensor, position: PamaPosition) -> Tensor:
        """(B, H, K, L)."""
        b, h, k, _ = scores.shape
        table = self.polar_embed.weight.float().T.expand(h, -1)[None, :, None].expand(b, h, k, -1)
        if self.kro:
            bins = torch.arange(table.shape[-1], device=scores.device)
            table = table.gather(-1, (bins - main_sectors(scores, position.sectors)[..., None]) % len(bins))
        # A product with the one-hot sectors: the gradient of a lookup adds in no fixed order on a GPU.
        with torch.autocast(scores.device.type, enabled=False):
            polar = torch.einsum("bklr,bhkr->bhkl", position.sectors, table)
        return self.distance_embed(position.distance).permute(0, 3, 1, 2).float() + polar

    def no_weight_decay(self) -> set[str]:
        """The tables of positions."""
        return {"distance_embed.weight", "polar_embed.weight"}


def _near_first(num_heads: int) -> Tensor:
    """First E_dist, (bins, heads): -distance / reach, the reach growing over the heads from a 16th of the slide's
    largest distance to a half.

    Tiles and anchors so read what is near from the first step. From the published N(0, 1) an optimiser, which moves an
    entry by no more than its learning rate in a step, needs thousands of steps until they do.
    """
    reach = DISTANCE_BINS * torch.logspace(-4, -1, num_heads, base=2)
    return -torch.arange(DISTANCE_BINS + 2)[:, None] / reach


@torch.no_grad()
def main_sectors(scores: Tensor, sectors: Tensor) -> Tensor:
    """The sector of each head and anchor with the largest sum of |scores|: (B, H, K, L), (B, K, L, R) -> (B, H, K)."""
    with torch.autocast(scores.device.type, enabled=False):
        return torch.einsum("bhkl,bklr->bhkr", scores.abs(), sectors).argmax(-1)


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis of (B, H, q, n), float32; 0 where mask (B, n) is False."""
    return scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)


class PamaBlock(nn.Module):
    """PACA and an MLP, for tiles and anchors alike: the weights are shared.

    ``x = x + PACA(LN(x)); x = x + MLP(LN(x))``; with `compat`, as the published code has it, the first sum is
    ``LN(x) + PACA(LN(x))``.

    Args:
        dim, num_heads, polar_bins, kro, shared_polar: of `PACA`.
        mlp_ratio: width of the MLP over `dim`.
        drop_rate: share of the outputs dropped in training.
        drop_path_rate: chance that a slide skips a branch in training.
        compat: see above.

    Shape: as `PACA`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        polar_bins: int = 8,
        kro: bool = True,
        shared_polar: bool = False,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        compat: bool = False,
    ) -> None:
        super().__init__()
        self.compat = compat
        self.norm1 = nn.LayerNorm(dim)
        self.attn = PACA(dim, num_heads, polar_bins, kro, shared_polar, proj_drop=drop_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self, tiles: Tensor, anchors: Tensor, position: PamaPosition
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        normed = self.norm1(tiles), self.norm1(anchors)
        read, weights = self.attn(*normed, position)
        kept = normed if self.compat else (tiles, anchors)
        tiles, anchors = map(self._add, kept, read)
        return (tiles, anchors), weights

    def _add(self, x: Tensor, read: Tensor) -> Tensor:
        x = x + self.drop_path(read)
        return x + self.drop_path(self.mlp(self.norm2(x)))
