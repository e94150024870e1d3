"""MAMIM, Mamba Masked Image Modeling: learn an encoder from tiles without labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, trunc_normal_
from torch import Tensor, nn

from ssmamba_models.layers.dms import pool_hold
from ssmamba_models.models.ssmamba import Block, SSMamba

MASKED_STATES = ("token", "hold")


class MamimDecoder(nn.Module):
    """From the last two stages to pixels: stage 4 is upsampled and joined to stage 3, then DMS blocks and a linear map.

    Args:
        stage3, stage4: widths of the encoder's last two stages.
        dim, depth: width and number of the decoder's blocks.
        patch_size: P, side in pixels of what one position of stage 3 predicts.

    Shape: (B, h, w, stage3) and (B, ceil(h / 2), ceil(w / 2), stage4) -> (B, h, w, P * P * 3).
    """

    def __init__(self, stage3: int, stage4: int, dim: int, depth: int, patch_size: int) -> None:
        super().__init__()
        self.join = nn.Linear(stage3 + stage4, dim)
        self.blocks = nn.ModuleList(Block(dim, (1, 2)) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.to_pixels = nn.Linear(dim, patch_size**2 * 3)
        for linear in (self.join, self.to_pixels):
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        coarse = F.interpolate(coarse.permute(0, 3, 1, 2), size=fine.shape[1:3], mode="nearest").permute(0, 2, 3, 1)
        x = self.join(torch.cat([fine, coarse], dim=-1))
        for block in self.blocks:
            x = block(x)
        return self.to_pixels(self.norm(x))


class MAMIM(nn.Module):
    """Masked image modelling at two magnifications, with an alignment across them.

    Cells of both views are hidden: their pixels are zero, and one learned token stands at every hidden position of the
    stem's output. The encoder sees all positions in order, and a light decoder predicts the hidden pixels. Moreover the
    low view's features, cut out where the high view lies, predict the high view's::

        L = L_low + L_high + cross_weight * L_cross
        L_low, L_high = mean over hidden patches of || prediction - normalised pixels ||^2 / (3 P^2)
        L_cross = mean over visible cells of the high view of 1 - cos(predictor(window(z_low)), stop-gradient(z_high))

    Args:
        encoder: an ssmamba model; it stays a plain timm model. Its head plays no part and is frozen here.
        patch_size: P, pixels; the stride of the encoder's third stage (16).
        cell_size: side of a masked cell in pixels, a multiple of `patch_size`.
        masked_state: "token", or "hold": the states of every scan also pass hidden positions untouched.
        cross_weight: weight of the alignment; 0 leaves it out. Keep it small: the target is a plain stop-gradient, and
            weights near 1 were seen to collapse the features.
        decoder_dim, decoder_depth: width and number of the decoder's blocks.

    forward: a batch as `MamimViews` makes it: low, high (B, 3, S, S); low_mask, high_mask (B, S / cell_size,
        S / cell_size) bool; theta (B, 2, 3) -> dict of scalars: loss, low, high, cross (0 where left out), and,
        detached, feature_cosine (mean cosine between the pooled features of different images; 1 is collapse) and
        feature_rank (their effective rank, at most B).

    Raises:
        ValueError: an encoder that is no ssmamba, an argument out of its range, a batch that does not fit.

    Source: SSMamba (arXiv:2604.15711), MAMIM, as this project reads it; normalised pixels as MAE (arXiv:2111.06377,
    sec. 4); tokens instead of dropped positions, and the ratio, after MAP (arXiv:2410.00871); stop-gradient predictor
    as SimSiam (arXiv:2011.10566, eq. 1); effective rank: Roy and Vetterli (EUSIPCO 2007).
    """

    def __init__(
        self,
        encoder: SSMamba,
        patch_size: int = 16,
        cell_size: int = 32,
        masked_state: str = "token",
        cross_weight: float = 0.1,
        decoder_dim: int = 256,
        decoder_depth: int = 2,
    ) -> None:
        super().__init__()
        _check_encoder(encoder, patch_size)
        if cell_size < patch_size or cell_size % patch_size:
            raise ValueError(f"cell_size is {cell_size}, expected a multiple of patch_size, which is {patch_size}")
        if masked_state not in MASKED_STATES:
            raise ValueError(f"masked_state is {masked_state!r}, expected one of {', '.join(MASKED_STATES)}")
        if cross_weight < 0:
            raise ValueError(f"cross_weight is {cross_weight}, expected 0 or more")
        if decoder_dim < 2 or decoder_depth < 0:
            raise ValueError(
                f"decoder_dim is {decoder_dim} and decoder_depth is {decoder_depth}, expected at least 2 and 0"
            )
        self.encoder = encoder
        self.patch_size, self.cell_size = patch_size, cell_size
        self.masked_state, self.cross_weight = masked_state, cross_weight
        widths = [info["num_chs"] for info in encoder.feature_info]
        self.mask_token = nn.Parameter(torch.zeros(widths[0]))
        trunc_normal_(self.mask_token, std=0.02)
        self.decoder = MamimDecoder(widths[2], widths[3], decoder_dim, decoder_depth, patch_size)
        if cross_weight > 0:
            self.predictor = nn.Sequential(
                nn.Linear(widths[3], widths[3]), LayerNorm(widths[3]), nn.GELU(), nn.Linear(widths[3], widths[3])
            )
        # A parameter without a gradient stops distributed training.
        encoder.head.requires_grad_(False)
        config = encoder.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config.get("mean", IMAGENET_DEFAULT_MEAN)).view(3, 1, 1), False)
        self.register_buffer("std", torch.tensor(config.get("std", IMAGENET_DEFAULT_STD)).view(3, 1, 1), False)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._check_batch(batch)
        # Both views in one pass: larger matrix products.
        images = torch.cat([batch["low"], batch["high"]])
        mask = torch.cat([batch["low_mask"], batch["high_mask"]])
        fine, coarse = self._encode(images, mask)
        low, high = self._pixel_loss(self.decoder(fine, coarse), images, mask).chunk(2)
        losses = {"low": low.mean(), "high": high.mean()}
        coarse_low, coarse_high = coarse.chunk(2)
        if self.cross_weight > 0:
            losses["cross"] = self._cross_loss(coarse_low, coarse_high, batch["theta"], batch["high_mask"])
        else:
            losses["cross"] = losses["low"].new_zeros(())
        loss = losses["low"] + losses["high"] + self.cross_weight * losses["cross"]
        return {"loss": loss, **losses, **feature_spread(coarse_high)}

    @torch.no_grad()
    def reconstruct(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pictures of what the model fills in.

        Args:
            batch: as in `forward`; only low and low_mask are read.

        Returns:
            input, masked (hidden cells grey), predicted (hidden cells as predicted, given each patch's own mean and
            variance, as the loss does): (B, 3, S, S) in 0..1, of the low view.
        """
        images, mask = batch["low"], batch["low_mask"]
        predicted = self.decoder(*self._encode(images, mask)).float()
        patches = self._patches(images)
        predicted = predicted * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
        hidden = _enlarge(mask, self.cell_size)[:, None]
        shown = (images.float() * self.std + self.mean).clamp(0, 1)
        filled = (self._image(predicted, images.shape[2:]) * self.std + self.mean).clamp(0, 1)
        return {
            "input": shown,
            "masked": torch.where(hidden, torch.full_like(shown, 0.5), shown),
            "predicted": torch.where(hidden, filled, shown),
        }

    def _encode(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of stages 3 and 4, (B, h, w, C), of images whose masked cells are hidden."""
        images = images.masked_fill(_enlarge(mask, self.cell_size)[:, None], 0.0)
        x = self.encoder.stem(images)
        # A token that holds a masked pixel's position: cells are multiples of the stem's stride.
        hidden = _enlarge(mask, self.cell_size // 4)
        x = torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)
        hold = hidden if self.masked_state == "hold" else None
        maps = []
        for i, stage in enumerate(self.encoder.stages):
            if i > 0 and hold is not None:
                hold = pool_hold(hold, 2)
            x = stage(x, hold)
            maps.append(x)
        return maps[2], maps[3]

    def _pixel_loss(self, predicted: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of each image's masked patches, (B,)."""
        patches = self._patches(images)
        target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (predicted.float() - target).square().mean(-1)
        hidden = _enlarge(mask, self.cell_size // self.patch_size).float()
        return (error * hidden).sum((1, 2)) / hidden.sum((1, 2))

    def _cross_loss(self, low: Tensor, high: Tensor, theta: Tensor, high_mask: Tensor) -> Tensor:
        size = [high.shape[0], high.shape[3], high.shape[1], high.shape[2]]
        grid = F.affine_grid(theta.float(), size, align_corners=False)
        # Half a cell of the high view may lie beyond the low view's outermost cell centres.
        window = F.grid_sample(low.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)
        predicted = self.predictor(window.permute(0, 2, 3, 1))
        similarity = F.cosine_similarity(predicted.float(), high.detach().float(), dim=-1)
        visible = F.adaptive_avg_pool2d((~high_mask)[:, None].float(), high.shape[1:3])[:, 0]
        return ((1 - similarity) * visible).sum() / visible.sum()

    def _patches(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H / P, W / P, P * P * 3) float32."""
        b, c, h, w = images.shape
        p = self.patch_size
        x = images.float().reshape(b, c, h // p, p, w // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(b, h // p, w // p, p * p * c)

    def _image(self, patches: Tensor, size: torch.Size) -> Tensor:
        """The inverse of `_patches`."""
        b, h, w, _ = patches.shape
        p = self.patch_size
        x = patches.reshape(b, h, w, p, p, 3).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(b, 3, *size)

    def _check_batch(self, batch: Mapping[str, Tensor]) -> None:
        for view in ("low", "high"):
            images, mask = batch[view], batch[f"{view}_mask"]
            if images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(f"MAMIM: {view} has shape {tuple(images.shape)}, expected (B, 3, H, W)")
            cells = tuple(side / self.cell_size for side in images.shape[2:])
            if tuple(mask.shape) != (images.shape[0], *cells):
                raise ValueError(
                    f"MAMIM: {view}_mask has shape {tuple(mask.shape)}, expected one entry per cell of "
                    f"{self.cell_size} px of {view}, which has shape {tuple(images.shape)}"
                )


@torch.no_grad()
def feature_spread(maps: Tensor) -> dict[str, Tensor]:
    """How far the features of different images are apart: a falling rank and a cosine near 1 tell of collapse.

    Args:
        maps: (B, h, w, C).

    Returns:
        feature_cosine: mean cosine between the pooled features of different images. feature_rank: effective rank of the
        centred pooled features, exp of the entropy of the normalised singular values.
    """
    pooled = maps.float().mean((1, 2))
    count = len(pooled)
    unit = F.normalize(pooled, dim=-1)
    cosine = (unit.sum(0).square().sum() - count) / max(count * (count - 1), 1)
    values = torch.linalg.svdvals(pooled - pooled.mean(0))
    share = values / values.sum().clamp_min(1e-12)
    return {"feature_cosine": cosine, "feature_rank": torch.special.entr(share).sum().exp()}


def _enlarge(mask: Tensor, factor: int) -> Tensor:
    return mask.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _check_encoder(encoder: nn.Module, patch_size: int) -> None:
    if not isinstance(encoder, SSMamba):
        raise ValueError(
            f"MAMIM needs an ssmamba encoder, not {type(encoder).__name__}: it reads the stem and the stages; "
            "`ssmamba list` names them"
        )
    strides = [info["reduction"] for info in encoder.feature_info]
    if len(strides) != 4 or patch_size != strides[2]:
        raise ValueError(
            f"MAMIM: the encoder's strides are {strides} and patch_size is {patch_size}; expected four stages, and the "
            "third one's stride as patch_size"
        )
    if encoder.in_chans != 3:
        raise ValueError(f"MAMIM: the encoder takes {encoder.in_chans} channels, expected 3 (RGB)")
