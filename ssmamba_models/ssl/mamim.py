"""MAMIM, Mamba Masked Image Modeling: learn an encoder from tiles without labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, trunc_normal_
from torch import Tensor, nn

from ssmamba_models.layers.vector_spread import vector_spread
from ssmamba_models.models.ssmamba import Block, SSMamba, pool_hold
from ssmamba_models.ssl.info_nce import two_way_info_nce

MASKED_STATES = ("token", "hold")
ALIGNMENTS = ("contrast", "cosine")
_LEAST_STD = 0.05


class MamimDecoder(nn.Module):
    """From the last two stages to pixels: stage 4 is upsampled and joined to stage 3, then DMS blocks and a linear map.

    Args:
        stage3, stage4: widths of the encoder's last two stages.
        dim, depth: width and number of the decoder's blocks.
        patch_size: P, side in pixels of what one position of stage 3 predicts.

    Shape: (B, h, w, stage3) and (B, ceil(h / 2), ceil(w / 2), stage4) -> normalised pixels (B, h, w, P * P * 3), and
        colour (B, h, w, 6): see `patch_color`.
    """

    def __init__(self, stage3: int, stage4: int, dim: int, depth: int, patch_size: int) -> None:
        super().__init__()
        self.join = nn.Linear(stage3 + stage4, dim)
        self.blocks = nn.ModuleList(Block(dim, (1, 2)) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.to_pixels = nn.Linear(dim, patch_size**2 * 3)
        self.to_color = nn.Linear(dim, 6)
        for linear in (self.join, self.to_pixels, self.to_color):
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        coarse = F.interpolate(coarse.permute(0, 3, 1, 2), size=fine.shape[1:3], mode="nearest").permute(0, 2, 3, 1)
        x = self.join(torch.cat([fine, coarse], dim=-1))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.to_pixels(x), self.to_color(x)


class MAMIM(nn.Module):
    """Mamba Masked Image Modelling at two magnifications, with an alignment across them.

    Cells of both views are hidden: their pixels are zero, and one learned token stands at every hidden position of the
    stem's output. The encoder sees all positions in order, and a light decoder predicts the hidden pixels. Moreover the
    low view's features, cut out where the high view lies, are aligned with the high view's::

        L = L_low + L_high + color_weight * L_color + cross_weight * L_cross
        L_low, L_high = mean over hidden patches of || prediction - normalised pixels ||^2 / (3 P^2)
        L_color = mean over hidden patches of both views of || prediction - patch_color ||^2 / 6

    and, with p the predictor and the mean over the cells that the high view shows,

    alignment="contrast": q = p(mean of window(z_low)), k = p(mean of z_high), both of length 1; InfoNCE both ways: each
        q must find its own k among those of the global batch, and each k its q.
    alignment="cosine": L_cross = mean over cells of 1 - cos(p(window(z_low)), stop-gradient(z_high)).

    Normalised pixels alone teach an encoder to forget brightness and contrast, which tell much of a stained tissue:
    L_color keeps them. The cosine form's target can be met by features that hardly differ between images (their mean
    cosine, feature_cosine, reaches 1 within tens of steps); the contrastive form cannot.

    Args:
        encoder: an ssmamba model; it stays a plain timm model. Its head plays no part and is frozen here.
        patch_size: P, pixels; the stride of the encoder's third stage (16).
        cell_size: side of a masked cell in pixels, a multiple of `patch_size`.
        masked_state: "token", or "hold": the states of every scan also pass hidden positions untouched.
        alignment: "contrast" or "cosine", as above.
        cross_weight: weight of the alignment; 0 leaves it out. Keep the cosine form's at 0.1 or less: weights near 1
            were seen to collapse the features.
        temperature: of the contrastive alignment. Its candidates are the tiles of one forward pass on all processes:
            with gradient accumulation, those of a part of the batch.
        color_weight: weight of the patches' colour; 0 leaves it out.
        decoder_dim, decoder_depth: width and number of the decoder's blocks.

    forward: a batch as `MamimViews` makes it: low, high (B, 3, S, S); low_mask, high_mask (B, S / cell_size,
        S / cell_size) bool; theta (B, 2, 3) -> dict of scalars: loss, low, high, color and cross (0 where left out),
        and, detached, feature_cosine (mean cosine between the pooled features of different images; 1 is collapse) and
        feature_rank (their effective rank, at most B).

    Raises:
        ValueError: an encoder that is no ssmamba, an argument out of its range, a batch that does not fit.

    Source: SSMamba (arXiv:2604.15711), MAMIM, as this project reads it; normalised pixels as MAE (arXiv:2111.06377,
    sec. 4); tokens instead of dropped positions, and the ratio, after MAP (arXiv:2410.00871); InfoNCE:
    arXiv:1807.03748, eq. 4; stop-gradient predictor as SimSiam (arXiv:2011.10566, eq. 1); effective rank: Roy and
    Vetterli (EUSIPCO 2007).
    """

    def __init__(
        self,
        encoder: SSMamba,
        patch_size: int = 16,
        cell_size: int = 32,
        masked_state: str = "token",
        alignment: str = "contrast",
        cross_weight: float = 0.3,
        temperature: float = 0.2,
        color_weight: float = 0.5,
        decoder_dim: int = 256,
        decoder_depth: int = 2,
    ) -> None:
        super().__init__()
        _check_encoder(encoder, patch_size)
        if cell_size < patch_size or cell_size % patch_size:
            raise ValueError(f"cell_size is {cell_size}, expected a multiple of patch_size, which is {patch_size}")
        for name, value, known in (
            ("masked_state", masked_state, MASKED_STATES),
            ("alignment", alignment, ALIGNMENTS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        # Written so that NaN, which YAML has too, fails them.
        for name, value in (("cross_weight", cross_weight), ("color_weight", color_weight)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}, expected 0 or more")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected more than 0")
        if decoder_dim < 2 or decoder_depth < 0:
            raise ValueError(
                f"decoder_dim is {decoder_dim} and decoder_depth is {decoder_depth}, expected at least 2 and 0"
            )
        self.encoder = encoder
        self.patch_size, self.cell_size = patch_size, cell_size
        self.masked_state, self.alignment, self.temperature = masked_state, alignment, temperature
        self.cross_weight, self.color_weight = cross_weight, color_weight
        widths = [info["num_chs"] for info in encoder.feature_info]
        self.mask_token = nn.Parameter(torch.zeros(widths[0]))
        trunc_normal_(self.mask_token, std=0.02)
        self.decoder = MamimDecoder(widths[2], widths[3], decoder_dim, decoder_depth, patch_size)
        # A parameter without a gradient stops distributed training.
        self.decoder.to_color.requires_grad_(color_weight > 0)
        encoder.head.requires_grad_(False)
        if cross_weight > 0:
            self.predictor = nn.Sequential(
                nn.Linear(widths[3], widths[3]), LayerNorm(widths[3]), nn.GELU(), nn.Linear(widths[3], widths[3])
            )
        config = encoder.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config.get("mean", IMAGENET_DEFAULT_MEAN)).view(3, 1, 1), False)
        self.register_buffer("std", torch.tensor(config.get("std", IMAGENET_DEFAULT_STD)).view(3, 1, 1), False)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._check_batch(batch)
        # Both views in one pass: larger matrix products.
        images = torch.cat([batch["low"], batch["high"]])
        mask = torch.cat([batch["low_mask"], batch["high_mask"]])
        fine, coarse = self._encode(images, mask)
        pixels, color = self._reconstruction_losses(fine, coarse, images, mask)
        low, high = pixels.chunk(2)
        losses = {"low": low.mean(), "high": high.mean(), "color": color.mean()}
        coarse_low, coarse_high = coarse.chunk(2)
        losses["cross"] = self._cross_loss(coarse_low, coarse_high, batch["theta"], batch["high_mask"])
        loss = losses["low"] + losses["high"]
        # Not multiplied by a weight of 0: where a term is left out, it plays no part at all.
        for name, weight in (("color", self.color_weight), ("cross", self.cross_weight)):
            loss = loss + weight * losses[name] if weight > 0 else loss
        return {"loss": loss, **losses, **feature_spread(coarse_high)}

    @torch.no_grad()
    def reconstruct(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pictures of what the model fills in.

        Args:
            batch: as in `forward`; only low and low_mask are read.

        Returns:
            input, masked (hidden cells grey), predicted (hidden cells as predicted: structure and colour; with
            color_weight 0, which learns no colour, given each patch's own mean and variance): (B, 3, S, S) in 0..1, of
            the low view.
        """
        images, mask = batch["low"], batch["low_mask"]
        predicted, color = (output.float() for output in self.decoder(*self._encode(images, mask)))
        if self.color_weight == 0:
            color = patch_color(self._patches(images))
        mean, std = _joint_moments(color)
        predicted = predicted * std + mean
        hidden = _enlarge(mask, self.cell_size)[:, None]
        shown = (images.float() * self.std + self.mean).clamp(0, 1)
        filled = (self._image(predicted) * self.std + self.mean).clamp(0, 1)
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

    def _reconstruction_losses(
        self, fine: Tensor, coarse: Tensor, images: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean squared errors over each image's hidden patches: of normalised pixels, and of colour, (B,) each."""
        pixels, color = self.decoder(fine, coarse)
        patches = self._patches(images)
        target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        hidden = _enlarge(mask, self.cell_size // self.patch_size).float()

        def error(predicted: Tensor, wanted: Tensor) -> Tensor:
            return ((predicted.float() - wanted).square().mean(-1) * hidden).sum((1, 2)) / hidden.sum((1, 2))

        if self.color_weight == 0:
            return error(pixels, target), pixels.new_zeros(len(images))
        return error(pixels, target), error(color, patch_color(patches))

    def _cross_loss(self, low: Tensor, high: Tensor, theta: Tensor, high_mask: Tensor) -> Tensor:
        if self.cross_weight == 0:
            return low.new_zeros(())
        size = [high.shape[0], high.shape[3], high.shape[1], high.shape[2]]
        grid = F.affine_grid(theta.float(), size, align_corners=False)
        # Half a cell of the high view may lie beyond the low view's outermost cell centres.
        window = F.grid_sample(low.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)
        window = window.permute(0, 2, 3, 1)
        visible = F.adaptive_avg_pool2d((~high_mask)[:, None].float(), high.shape[1:3])[:, 0]
        if self.alignment == "cosine":
            similarity = F.cosine_similarity(self.predictor(window).float(), high.detach().float(), dim=-1)
            return ((1 - similarity) * visible).sum() / visible.sum()
        share = (visible / visible.sum((1, 2), keepdim=True))[..., None]
        pooled = torch.stack([(window * share).sum((1, 2)), (high.float() * share).sum((1, 2))])
        # Normalised as the encoder's head does: a few strong channels would drown the rest.
        pooled = F.layer_norm(pooled, pooled.shape[-1:])
        return two_way_info_nce(*self.predictor(pooled).float(), self.temperature)

    def _patches(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H / P, W / P, P * P * 3) float32."""
        p = self.patch_size
        return rearrange(images.float(), "b c (h i) (w j) -> b h w (i j c)", i=p, j=p)

    def _image(self, patches: Tensor) -> Tensor:
        """The inverse of `_patches`."""
        p = self.patch_size
        return rearrange(patches, "b h w (i j c) -> b c (h i) (w j)", i=p, j=p)

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
            stride = self.encoder.feature_info[-1]["reduction"]
            if self.cross_weight > 0 and any(side % stride for side in images.shape[2:]):
                # The last map would reach beyond the view's edge, and `theta` would point beside the place.
                raise ValueError(
                    f"MAMIM: {view} has shape {tuple(images.shape)}; aligning views needs sides that are multiples of "
                    f"{stride} px: choose another img_size, or cross_weight=0"
                )


def patch_color(patches: Tensor) -> Tensor:
    """What normalising a patch takes away: each channel's mean and log standard deviation.

    Args:
        patches: (..., P * P * 3), channels last.

    Returns:
        (..., 6): the means of red, green, blue, then the logarithms of their standard deviations (plus 0.05, about what
        compression and noise leave of a blank patch).
    """
    pixels = patches.unflatten(-1, (-1, 3))
    return torch.cat([pixels.mean(-2), torch.log(pixels.std(-2) + _LEAST_STD)], dim=-1)


def _joint_moments(color: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all of a patch's values, (..., 1) each, from its `patch_color`."""
    means, stds = color[..., :3], (color[..., 3:].exp() - _LEAST_STD).clamp_min(0)
    variance = stds.square().mean(-1, keepdim=True) + means.var(-1, correction=0, keepdim=True)
    return means.mean(-1, keepdim=True), (variance + 1e-6).sqrt()


@torch.no_grad()
def feature_spread(maps: Tensor) -> dict[str, Tensor]:
    """How far the features of different images are apart: a falling rank and a cosine near 1 tell of collapse.

    Args:
        maps: (B, h, w, C).

    Returns:
        feature_cosine: mean cosine between the pooled features of different images. feature_rank: effective rank of the
        centred pooled features, exp of the entropy of the normalised singular values. Both are NaN where a feature is
        not finite.
    """
    return vector_spread(maps.float().mean((1, 2)))


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
