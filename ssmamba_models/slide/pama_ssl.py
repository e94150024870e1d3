"""PAMA's masked autoencoder: learn a slide encoder by predicting the features of hidden tiles."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssmamba_models.layers.vector_spread import vector_spread
from ssmamba_models.slide.pama import PAMA, PamaTokens, init_linear
from ssmamba_models.slide.pama_attention import PamaBlock
from ssmamba_models.slide.pama_geometry import PamaGeometry
from ssmamba_models.slide.tile_sample import front_places, pick_tiles, smallest


class PamaPretraining(nn.Module):
    """Position-aware masked autoencoding: the encoder reads a part of the tiles, a light decoder predicts the others.

    ``L = mean over slides of the mean over hidden tiles of || prediction - feature ||^2 / D``

    The decoder has the encoder's class token, tiles and anchors, a learned token at each hidden tile, and the geometry
    of all tiles; its blocks are the encoder's, narrower.

    Args:
        encoder: a `PAMA`.
        mask_ratio: share of each slide's tiles that is hidden, never padding; one is hidden and, if there are two, one
            shown.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.

    forward: a batch as `PamaViews.collate` makes it -> dict of scalars: loss, and, detached, feature_cosine and
        feature_rank of the slides' vectors (see `vector_spread`). Without noise or anchor_noise in the batch, torch's
        global generator draws them; without distance, the geometry is computed.

    Raises:
        ValueError: an argument out of its range, or a batch that does not fit.

    Source: PAMA (arXiv:2407.07504), sec. III-C; MAE (arXiv:2111.06377).
    """

    def __init__(
        self,
        encoder: PAMA,
        *,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 2,
        decoder_heads: int = 8,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, PAMA):
            raise ValueError(f"the encoder is a {type(encoder).__name__}, expected a PAMA, such as pama_small")
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio}, expected more than 0 and less than 1")
        for name, value in (("decoder_dim", decoder_dim), ("decoder_depth", decoder_depth)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        self.encoder, self.mask_ratio = encoder, mask_ratio
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_blocks = nn.ModuleList(
            PamaBlock(
                decoder_dim,
                decoder_heads,
                encoder.polar_bins,
                encoder.kro,
                encoder.shared_polar,
                compat=encoder.compat,
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, encoder.feature_dim)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_linear)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        features, mask = batch["features"], batch.get("mask")
        self.encoder.check(features, batch.get("grid"), mask)
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        features = features.masked_fill(~mask[..., None], 0)
        geometry = self._geometry(batch, mask)
        visible = self.visible(mask, batch.get("noise"))
        place, shown = front_places(visible)
        tokens = self.encoder.tokens(
            pick_tiles(features, place), None, shown, _seen(geometry, place), batch.get("anchor_noise")
        )
        predicted = self._decode(tokens, place, shown, geometry, mask)
        error = (predicted.float() - features.float()).square().mean(-1)
        hidden = mask & ~visible
        loss = ((error * hidden).sum(1) / hidden.sum(1)).mean()
        return {"loss": loss, **vector_spread(self.encoder.norm(tokens.tiles[:, 0]))}

    def visible(self, mask: Tensor, noise: Tensor | None = None) -> Tensor:
        """Which tiles the encoder reads, (B, N) bool: those with the least noise (B, N), which None draws."""
        noise = torch.rand(mask.shape, device=mask.device) if noise is None else noise
        tiles = mask.sum(1)
        hidden = (tiles * self.mask_ratio).round().long().clamp(min=1).minimum((tiles - 1).clamp(min=1))
        return smallest(noise, mask, tiles - hidden)

    def _geometry(self, batch: Mapping[str, Tensor], mask: Tensor) -> PamaGeometry:
        if "distance" not in batch:
            return self.encoder.geometry(batch["grid"], mask)
        return PamaGeometry(batch["anchors"], batch["distance"], batch["polar"], batch["anchor_mask"])

    def _decode(
        self, tokens: PamaTokens, place: Tensor, shown: Tensor, geometry: PamaGeometry, mask: Tensor
    ) -> Tensor:
        """Predictions (B, N, D)."""
        norm = self.encoder.norm
        x, anchors = self.decoder_embed(norm(tokens.tiles)), self.decoder_embed(norm(tokens.anchors))
        # A slide with fewer visible tiles than others has hidden ones among the places of `front_places`.
        token = self.mask_token.to(x.dtype)
        seen = torch.where(shown[..., None], x[:, 1:], token)
        tiles = token.expand(*mask.shape, -1).scatter(1, place[..., None].expand_as(seen), seen)
        x = torch.cat([x[:, :1], tiles], dim=1)
        position = self.encoder.position(geometry, mask, tokens.anchor_mask)
        for block in self.decoder_blocks:
            (x, anchors), _ = block(x, anchors, position)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def no_weight_decay(self) -> set[str]:
        """The mask token; the encoder and the blocks name their own."""
        return {"mask_token"}


def _seen(geometry: PamaGeometry, place: Tensor) -> PamaGeometry:
    """The geometry of the tiles at places (B, V) alone; the anchors keep their numbers among all tiles."""
    wide = place[:, None].expand(-1, geometry.distance.shape[1], -1)
    distance, polar = (bins.gather(2, wide) for bins in (geometry.distance, geometry.polar))
    return PamaGeometry(geometry.anchors, distance, polar, geometry.anchor_mask)
