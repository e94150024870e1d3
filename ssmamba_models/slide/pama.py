"""PAMA: a transformer over the tiles of a slide in which a few anchors read and tell where everything lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssmamba_models.slide.pama_attention import PamaBlock, PamaPosition, one_hot_sectors
from ssmamba_models.slide.pama_geometry import PamaGeometry, slide_geometry, spread_geometry, stack_geometry
from ssmamba_models.slide.slide_encoder import SlideEncoder
from ssmamba_models.slide.tile_sample import sample_tiles, smallest


@dataclass(frozen=True)
class PamaTokens:
    """What the blocks make of B slides with N tiles and K anchors.

    Attributes:
        tiles: (B, 1 + N, E), the class token first, and anchors: (B, K, E); both before the last norm.
        anchor_mask: (B, K) bool, False at padding, and for anchors that were dropped.
        class_weights: (B, H, K), how much the class token reads each anchor, in the last block; sums to 1.
        anchor_weights: (B, H, K, N), how much each anchor read each tile, in the block before; sums to 1 with what it
            read of the class token.
        geometry: what the anchors are, and where the tiles lie.
    """

    tiles: Tensor
    anchors: Tensor
    anchor_mask: Tensor
    class_weights: Tensor
    anchor_weights: Tensor
    geometry: PamaGeometry

    @property
    def attention(self) -> Tensor:
        """(B, N), how much each tile reached the slide's vector by way of the anchors; the mean over heads, sum 1."""
        weights = torch.einsum("bk,bkn->bn", self.class_weights.mean(1), self.anchor_weights.mean(1))
        return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


class PAMA(SlideEncoder):
    """Position-aware masked autoencoder's encoder: tiles and anchors read each other, `depth` times.

    A linear map makes the tiles' features tokens, a class token stands before them, and K anchors, which all begin as
    one learned vector, differ only by where they lie: see `slide_geometry` and `PACA`. The class token reads as a tile
    at the mean distance from each anchor, without direction. The vector is LN(class token). Two blocks are the least:
    the class token reads anchors that have read tiles.

    Args:
        feature_dim: D, the length of a tile's feature.
        embed_dim: E, width and length of the vector.
        depth: number of blocks.
        num_heads: heads; they divide embed_dim.
        mlp_ratio: width of the MLPs over embed_dim.
        polar_bins: R, sectors.
        kro: whether anchors count sectors from where they look, so that turning the slide does not matter.
        anchor_drop_rate: in training this share of a slide's anchors is left out, at random, and those kept are scaled
            by 1 / (1 - rate) (AD); one always stays.
        tiles_per_anchor, max_anchors: of `slide_geometry`.
        max_tiles: most tiles that `embed` and the views of a training read at once.
        drop_rate, drop_path_rate: of the blocks.
        shared_polar: whether all heads share one table of sectors.
        compat: compute as the published code: residuals start at the normalised input; the class token has the mean
            sector and votes, and a tile at an anchor's own place is in sector 0. (There, padding has places and votes
            as well: equal to it are slides that fill its 2,048 tiles.) See `load_pama_checkpoint`.

    Raises:
        ValueError: an argument out of its range; otherwise as `SlideEncoder`, and coordinates that are NaN or infinite.

    Shape: as `SlideEncoder`.

    Example:
        >>> encoder = create_slide_encoder("pama_small", feature_dim=512)
        >>> encoder(features, grid, mask)  # (B, N, 512), (B, N, 2), (B, N) -> (B, 512)

    Source: Wu et al., PAMA (arXiv:2407.07504), sec. III.
    """

    def __init__(
        self,
        feature_dim: int,
        embed_dim: int = 1024,
        depth: int = 4,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        polar_bins: int = 8,
        kro: bool = True,
        anchor_drop_rate: float = 0.2,
        tiles_per_anchor: int = 144,
        max_anchors: int = 128,
        max_tiles: int = 2048,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        shared_polar: bool = False,
        compat: bool = False,
    ) -> None:
        super().__init__(feature_dim, embed_dim)
        for name, value, least in (
            ("depth", depth, 2),
            ("polar_bins", polar_bins, 1),
            ("tiles_per_anchor", tiles_per_anchor, 1),
            ("max_anchors", max_anchors, 1),
            ("max_tiles", max_tiles, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, expected {least} or more")
        if not 0 <= anchor_drop_rate < 1:
            raise ValueError(f"anchor_drop_rate is {anchor_drop_rate}, expected 0 or more and less than 1")
        self.polar_bins, self.anchor_drop_rate, self.compat = polar_bins, anchor_drop_rate, compat
        self.tiles_per_anchor, self.max_anchors, self.max_tiles = tiles_per_anchor, max_anchors, max_tiles
        self.kro, self.shared_polar = kro, shared_polar
        self.patch_embed = nn.Linear(feature_dim, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.anchor_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        for token in (self.cls_token, self.anchor_token):
            nn.init.normal_(token, std=0.02)
        self.blocks = nn.ModuleList(
            PamaBlock(
                embed_dim, num_heads, polar_bins, kro, shared_polar, mlp_ratio, drop_rate, drop_path_rate, compat
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(init_linear)

    def encode(
        self,
        features: Tensor,
        grid: Tensor,
        mask: Tensor | None,
        geometry: PamaGeometry | None = None,
        anchor_noise: Tensor | None = None,
    ) -> Tensor:
        """As `SlideEncoder.encode`; the further arguments are those of `tokens`, and may be given to `forward`."""
        return self.norm(self.tokens(features, grid, mask, geometry, anchor_noise).tiles[:, 0])

    def tokens(
        self,
        features: Tensor,
        grid: Tensor | None,
        mask: Tensor | None = None,
        geometry: PamaGeometry | None = None,
        anchor_noise: Tensor | None = None,
    ) -> PamaTokens:
        """What the blocks make of tiles and anchors, and what they read; shapes are not checked.

        For a picture of a slide: `tokens(features, grid).attention`, or what single anchors read, `anchor_weights` of
        the tiles `geometry.anchors`.

        Args:
            features, grid, mask: as in `forward`; here a slide may be without tiles.
            geometry: of the slides, where it is known already, as from `PamaViews`; grid is then not read.
            anchor_noise: (B, K) floats: which anchors a training leaves out, those with the largest; None draws them
                by torch's global generator.
        """
        mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if mask is None else mask
        geometry = self.geometry(grid, mask) if geometry is None else geometry.to(features.device)
        position = self.position(geometry, mask, self._kept(geometry.anchor_mask, anchor_noise))
        tiles = self.patch_embed(features.masked_fill(~mask[..., None], 0))
        tiles = torch.cat([self.cls_token.to(tiles.dtype).expand(len(tiles), -1, -1), tiles], dim=1)
        anchors = self.anchor_token.to(tiles.dtype).expand(*geometry.anchors.shape, -1)
        if self.training:
            anchors = anchors / (1 - self.anchor_drop_rate)
        weights = []
        for block in self.blocks:
            (tiles, anchors), (by_tile, by_anchor) = block(tiles, anchors, position)
            weights = [*weights[-1:], (by_tile.detach()[:, :, 0], by_anchor.detach()[..., 1:])]
        return PamaTokens(tiles, anchors, position.anchor_mask, weights[1][0], weights[0][1], geometry)

    def geometry(self, grid: Tensor, mask: Tensor) -> PamaGeometry:
        """Anchors, distances and sectors of a batch of slides, on its device: grid (B, N, 2), mask (B, N)."""
        slides = [
            spread_geometry(self.slide_geometry(points[real]), real, self.polar_bins)
            for points, real in zip(grid.cpu(), mask.cpu())
        ]
        return stack_geometry(slides, self.polar_bins).to(grid.device)

    def slide_geometry(self, grid: Tensor) -> PamaGeometry:
        """The geometry of one slide, (N, 2), without padding."""
        return slide_geometry(grid, self.tiles_per_anchor, self.max_anchors, self.polar_bins)

    def position(self, geometry: PamaGeometry, mask: Tensor, anchor_mask: Tensor) -> PamaPosition:
        """Where the class token and the tiles stand; `anchor_mask` (B, K) is False for anchors that play no part."""
        real, tiles = mask[:, None], mask.sum(1).clamp(min=1)[:, None, None]

        def mean(bins: Tensor) -> Tensor:
            return (bins * real).sum(-1, keepdim=True) // tiles

        distance, polar = geometry.distance.long(), geometry.polar.long()
        if self.compat:
            polar = polar.masked_fill(polar == self.polar_bins, 0)
            class_polar = mean(polar)
        else:
            class_polar = polar.new_full((*polar.shape[:2], 1), self.polar_bins)
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        polar = torch.cat([class_polar, polar], dim=-1)
        return PamaPosition(
            torch.cat([mean(distance), distance], dim=-1),
            one_hot_sectors(polar, mask, self.polar_bins),
            mask,
            anchor_mask,
        )

    def _kept(self, anchor_mask: Tensor, noise: Tensor | None) -> Tensor:
        """Which anchors stay, (B, K): all of them, or in training a random part."""
        if not self.training or self.anchor_drop_rate == 0:
            return anchor_mask
        if noise is None:
            noise = torch.rand(anchor_mask.shape, device=anchor_mask.device)
        count = (anchor_mask.sum(1) * (1 - self.anchor_drop_rate) + 1e-4).long().clamp(min=1)
        return anchor_mask & smallest(noise, anchor_mask, count)

    def embed_slide(
        self,
        features: Tensor,
        grid: Tensor,
        generator: torch.Generator,
        views: int = 1,
        tiles: int | str | None = None,
    ) -> Tensor:
        """The vector of a slide, or of a sub-sample of its tiles where it has more than `max_tiles`.

        Args:
            features, grid, generator: as in `SlideEncoder.embed`.
            views: how many sub-samples are drawn, whose vectors are averaged.
            tiles: tiles of each, instead of `max_tiles`; "all" reads all at once, in memory that grows with them.

        Returns:
            (E,).

        Raises:
            ValueError: views or tiles is below 1, or no number.
        """
        limit = {None: self.max_tiles, "all": len(features)}.get(tiles, tiles)
        for name, value in (("views", views), ("tiles", limit)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected 1 or more" + (' or "all"' if name == "tiles" else ""))
        vectors = []
        for _ in range(views if limit < len(features) else 1):
            place = sample_tiles(len(features), limit, generator).to(features.device)
            drawn = (values[place].float().to(self.device)[None] for values in (features, grid))
            vectors.append(self.encode(*drawn, None)[0])
        return torch.stack(vectors).mean(0)

    def no_weight_decay(self) -> set[str]:
        """The tokens."""
        return {"cls_token", "anchor_token"}


def init_linear(module: nn.Module) -> None:
    """First weights of a linear layer: Xavier's, uniform, and no bias; other modules stay as they are."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
