"""MAMIM, Mamba Masked Image Modeling: learn an encoder from tiles without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, trunc_normal_
from torch import Tensor, nn

from ssmamba_models.layers.vector_spread import vector_spread
from ssmamba_models.models.ssmamba import Block, SSMamba, pool_hold
from ssmamba_models.ssl.ema_teacher import EmaTeacher
from ssmamba_models.ssl.feature_targets import enlarge, feature_error, feature_targets, resample
from ssmamba_models.ssl.info_nce import info_nce, two_way_info_nce

MASKED_STATES = ("token", "hold")
ALIGNMENTS = ("contrast", "cosine", "teacher")
_LEAST_STD = 0.05


class MamimDecoder(nn.Module):
    """From the last two stages to pixels: stage 4 is upsampled and joined to stage 3, then DMS blocks and a linear map.

    Args:
        stage3, stage4: widths of the encoder's last two stages.
        dim, depth: width and number of the decoder's blocks.
        patch_size: P, side in pixels of what one position of stage 3 predicts.
        features: names of predictions of a teacher's features (see `feature_targets`), each by a linear map of its own.

    Shape: (B, h, w, stage3) and (B, ceil(h / 2), ceil(w / 2), stage4) -> a dict of pixels, normalised,
        (B, h, w, P * P * 3); color (B, h, w, 6), see `patch_color`; and of each of `features`
        (B, h, w, stage3 + stage4).
    """

    def __init__(
        self, stage3: int, stage4: int, dim: int, depth: int, patch_size: int, features: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.join = nn.Linear(stage3 + stage4, dim)
        self.blocks = nn.ModuleList(Block(dim, (1, 2)) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.to_pixels = nn.Linear(dim, patch_size**2 * 3)
        self.to_color = nn.Linear(dim, 6)
        self.to_features = nn.ModuleDict({name: nn.Linear(dim, stage3 + stage4) for name in features})
        for linear in (self.join, self.to_pixels, self.to_color, *self.to_features.values()):
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, fine: Tensor, coarse: Tensor) -> dict[str, Tensor]:
        x = self.join(torch.cat([fine, enlarge(coarse, fine.shape[1:3])], dim=-1))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        heads = {"pixels": self.to_pixels, "color": self.to_color, **self.to_features}
        return {name: head(x) for name, head in heads.items()}


class MAMIM(nn.Module):
    """Mamba Masked Image Modelling at two magnifications, with an alignment across them.

    Patches of both views are masked: their pixels are zero, and one learned token stands at every masked position of
    the stem's output. The encoder sees all positions in order, and a light decoder predicts at the masked patches what
    was there. Moreover the low view's features, cut out where the high view lies, are aligned with the high view's::

        L = pixel_weight * (L_low + L_high) + color_weight * L_color
            + feature_weight * L_feature + cross_feature_weight * L_cross_feature
            + cross_weight * L_cross + local_weight * L_local
        L_low, L_high = mean over masked patches of || prediction - normalised pixels ||^2 / (3 P^2)
        L_color = mean over masked patches of both views of || prediction - patch_color ||^2 / 6

    Terms of weight 0 are not computed. Four terms have a teacher: an exponential moving average of the encoder and the
    predictor p that sees both views whole, gets no gradient and is no part of the exported weights. With t its maps of
    stages 3 and 4, standardised over the batch (`feature_targets`), d the decoder's predictions of them, and window(.)
    what a map of the low view shows at the high view's positions::

        L_feature = mean over masked patches of both views of || d_own - t ||^2 / channels
        L_cross_feature = 1/2 mean over low masked patches inside the window of || window(d_finer) - t_high ||^2 / ch.
                        + 1/2 mean over high masked patches of || d_coarser - window(t_low) ||^2 / channels
        L_local = mean over local views l of InfoNCE(p(z_l), p_teacher(z_teacher_low))

    L_cross_feature is cross-magnification prediction: a masked patch of one magnification predicts what the teacher
    sees of the same tissue at the other; its means are taken per tile first, then over tiles. The alignment, with z the
    stage-4 map and all vectors of length 1:

    alignment="contrast": q = p(mean of window(z_low)), k = p(mean of z_high), means over the patches that the high view
        shows; InfoNCE both ways: each q must find its own k among those of the global batch, and each k its q.
    alignment="teacher": q_low = p(mean of window(z_low)), q_high = p(mean of z_high) of the student, masked; k of the
        teacher, whole; L_cross = (InfoNCE(q_low, k_high) + InfoNCE(q_high, window's k_low)) / 2.
    alignment="cosine": L_cross = mean over patches of 1 - cos(p(window(z_low)), stop-gradient(z_high)).

    Normalised pixels alone teach an encoder to forget brightness and contrast, which tell much of a stained tissue:
    L_color keeps them. The cosine form's target can be met by features that hardly differ between images (their mean
    cosine, feature_cosine, reaches 1 within tens of steps); the contrastive forms cannot.

    Args:
        encoder: an ssmamba model; it stays a plain timm model. Its head plays no part and is frozen here.
        patch_size: P, pixels; the stride of the encoder's third stage (16).
        cell_size: side of a masked square in pixels, a multiple of `patch_size`.
        masked_state: "token", or "hold": the states of every scan also pass masked positions untouched.
        alignment: "contrast", "teacher" or "cosine", as above.
        cross_weight: weight of the alignment. Keep the cosine form's at 0.1 or less: weights near 1 were seen to
            collapse the features.
        temperature: of the contrastive losses. Their candidates are the tiles of one forward pass on all processes:
            with gradient accumulation, those of a part of the batch.
        color_weight, pixel_weight: weights of the patches' colour and of their normalised pixels.
        feature_weight, cross_feature_weight: weights of the teacher's features of the same and of the other view.
        local_weight: weight of the local views, which `MamimViews` draws with `local_crops`.
        teacher_momentum: of the teacher's average at the first step; see `EmaTeacher`.
        decoder_dim, decoder_depth: width and number of the decoder's blocks.
        steps: steps of the whole training, over which the momentum rises to 1; None keeps it.

    forward: a batch as `MamimViews` makes it: low, high (B, 3, S, S); low_mask, high_mask (B, S / cell_size,
        S / cell_size) bool; theta (B, 2, 3); for local_weight also local (B, n, 3, s, s) -> dict of scalars: loss, low,
        high, color, feature, cross_feature, cross and local (0 where left out), and, detached, feature_cosine (mean
        cosine between the pooled features of different images; 1 is collapse) and feature_rank (their effective rank,
        at most B). The teacher moves in `start_step`, which a training loop calls before each step.

    Raises:
        ValueError: an encoder that is no ssmamba, an argument out of its range, a batch that does not fit.

    Source: SSMamba (arXiv:2604.15711), MAMIM, as this project reads it; normalised pixels as MAE (arXiv:2111.06377,
    sec. 4); tokens instead of dropped positions, and the ratio, after MAP (arXiv:2410.00871); InfoNCE:
    arXiv:1807.03748, eq. 4; against a moving average: MoCo (arXiv:1911.05722, eq. 1 and 2), symmetric over views as
    MoCo v3 (arXiv:2104.02057, alg. 1); features of a teacher at masked patches: data2vec (arXiv:2202.03555, sec. 3)
    and iBOT (arXiv:2111.07832, sec. 3); local views: DINO (arXiv:2104.14294, sec. 3.1); stop-gradient predictor as
    SimSiam (arXiv:2011.10566, eq. 1); effective rank: Roy and Vetterli (EUSIPCO 2007).
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
        pixel_weight: float = 1.0,
        feature_weight: float = 0.0,
        cross_feature_weight: float = 0.0,
        local_weight: float = 0.0,
        teacher_momentum: float = 0.99,
        decoder_dim: int = 256,
        decoder_depth: int = 2,
        steps: int | None = None,
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
        weights = {
            "pixel": pixel_weight,
            "color": color_weight,
            "feature": feature_weight,
            "cross_feature": cross_feature_weight,
            "cross": cross_weight,
            "local": local_weight,
        }
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"{name}_weight is {value}, expected 0 or more")
        if not any(weights.values()):
            raise ValueError(f"the weights of {', '.join(weights)} are all 0: nothing to learn; set one above 0")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected more than 0")
        if decoder_dim < 2 or decoder_depth < 0:
            raise ValueError(
                f"decoder_dim is {decoder_dim} and decoder_depth is {decoder_depth}, expected at least 2 and 0"
            )
        self.encoder = encoder
        self.patch_size, self.cell_size = patch_size, cell_size
        self.masked_state, self.alignment, self.temperature = masked_state, alignment, temperature
        self.weights = weights
        widths = [info["num_chs"] for info in encoder.feature_info]
        self.mask_token = nn.Parameter(torch.zeros(widths[0]))
        trunc_normal_(self.mask_token, std=0.02)
        features = ["own"] * (feature_weight > 0) + ["finer", "coarser"] * (cross_feature_weight > 0)
        self.decoder = MamimDecoder(widths[2], widths[3], decoder_dim, decoder_depth, patch_size, features)
        # A parameter without a gradient stops distributed training.
        self.decoder.requires_grad_(pixel_weight > 0 or color_weight > 0 or bool(features))
        self.decoder.to_pixels.requires_grad_(pixel_weight > 0)
        self.decoder.to_color.requires_grad_(color_weight > 0)
        encoder.head.requires_grad_(False)
        if cross_weight > 0 or local_weight > 0:
            self.predictor = nn.Sequential(
                nn.Linear(widths[3], widths[3]), LayerNorm(widths[3]), nn.GELU(), nn.Linear(widths[3], widths[3])
            )
        compared = (alignment == "teacher" and cross_weight > 0) or local_weight > 0
        self.students = ["encoder"] * (compared or bool(features)) + ["predictor"] * compared
        if self.students:
            self.teacher = EmaTeacher(self._students(), teacher_momentum, steps)
        config = encoder.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config.get("mean", IMAGENET_DEFAULT_MEAN)).view(3, 1, 1), False)
        self.register_buffer("std", torch.tensor(config.get("std", IMAGENET_DEFAULT_STD)).view(3, 1, 1), False)

    def _students(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in self.students}

    def start_step(self, epoch: int, step: int) -> None:
        """Move the teacher, before each step; without a teacher nothing is done.

        Args:
            epoch: epochs done.
            step: steps done, over all epochs.
        """
        if self.students and step > 0:
            self.teacher.update(self._students(), step)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._check_batch(batch)
        # Both views in one pass: larger matrix products.
        images = torch.cat([batch["low"], batch["high"]])
        mask = torch.cat([batch["low_mask"], batch["high_mask"]])
        fine, coarse = self._encode(images, mask)
        taught = self._teach(images) if self.students else None
        losses = self._mask_losses(fine, coarse, taught, images, mask, batch["theta"])
        coarse_low, coarse_high = coarse.chunk(2)
        taught_coarse = (None, None) if taught is None else taught[1].chunk(2)
        losses["cross"] = self._cross_loss(coarse_low, coarse_high, *taught_coarse, batch["theta"], batch["high_mask"])
        losses["local"] = self._local_loss(batch, taught_coarse[0])
        loss = losses["low"].new_zeros(())
        for name, value in losses.items():
            weight = self.weights["pixel" if name in ("low", "high") else name]
            # Not multiplied by a weight of 0: where a term is left out, it plays no part at all.
            loss = loss + weight * value if weight > 0 else loss
        return {"loss": loss, **losses, **feature_spread(coarse_high)}

    @torch.no_grad()
    def reconstruct(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pictures of what the model fills in.

        Args:
            batch: as in `forward`; only low and low_mask are read.

        Returns:
            input, masked (masked patches grey), predicted (masked patches as predicted: structure and colour; with
            color_weight 0, which learns no colour, given each patch's own mean and variance; with pixel_weight 0, which
            learns no structure, flat): (B, 3, S, S) in 0..1, of the low view.
        """
        images, mask = batch["low"], batch["low_mask"]
        outputs = self.decoder(*self._encode(images, mask))
        predicted, color = (outputs[name].float() for name in ("pixels", "color"))
        if self.weights["pixel"] == 0:
            predicted = torch.zeros_like(predicted)
        if self.weights["color"] == 0:
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

    @torch.no_grad()
    def _teach(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's maps of stages 3 and 4, (B, h, w, C), of whole images."""
        encoder = cast(SSMamba, self.teacher["encoder"])
        maps = encoder.forward_intermediates(images, indices=2, output_fmt="NHWC", intermediates_only=True)
        return maps[0], maps[1]

    def _mask_losses(
        self,
        fine: Tensor,
        coarse: Tensor,
        taught: tuple[Tensor, Tensor] | None,
        images: Tensor,
        mask: Tensor,
        theta: Tensor,
    ) -> dict[str, Tensor]:
        """What is predicted at masked patches: of both views pixels, colour, and a teacher's features."""
        losses = dict.fromkeys(("low", "high", "color", "feature", "cross_feature"), fine.new_zeros(()))
        if not any(self.weights[name] > 0 for name in ("pixel", "color", "feature", "cross_feature")):
            return losses
        predicted = self.decoder(fine, coarse)
        hidden = _enlarge(mask, self.cell_size // self.patch_size).float()
        patches = self._patches(images)

        def error(name: str, wanted: Tensor) -> Tensor:
            square = (predicted[name].float() - wanted).square().mean(-1)
            return (square * hidden).sum((1, 2)) / hidden.sum((1, 2))

        if self.weights["pixel"] > 0:
            low, high = error("pixels", _normalised(patches)).chunk(2)
            losses["low"], losses["high"] = low.mean(), high.mean()
        if self.weights["color"] > 0:
            losses["color"] = error("color", patch_color(patches)).mean()
        if taught is not None and "own" in predicted:
            losses["feature"] = feature_error(predicted["own"], feature_targets(*taught), fine.shape[-1], hidden)
        if taught is not None and "finer" in predicted:
            losses["cross_feature"] = self._cross_feature_loss(predicted, feature_targets(*taught), hidden, theta)
        return losses

    def _cross_feature_loss(
        self, predicted: Mapping[str, Tensor], targets: Tensor, hidden: Tensor, theta: Tensor
    ) -> Tensor:
        """Mean over both directions of the error of predicting, at masked patches, the teacher's other view."""
        size = targets.shape[1:3]
        finer, _ = predicted["finer"].chunk(2)
        _, coarser = predicted["coarser"].chunk(2)
        low, high = targets.chunk(2)
        hidden_low, hidden_high = hidden.chunk(2)
        split = self.encoder.feature_info[2]["num_chs"]
        upwards = feature_error(
            resample(finer, theta, size), high, split, resample(hidden_low[..., None], theta, size)[..., 0]
        )
        downwards = feature_error(coarser, resample(low, theta, size), split, hidden_high)
        return (upwards + downwards) / 2

    def _cross_loss(
        self,
        low: Tensor,
        high: Tensor,
        taught_low: Tensor | None,
        taught_high: Tensor | None,
        theta: Tensor,
        high_mask: Tensor,
    ) -> Tensor:
        if self.weights["cross"] == 0:
            return low.new_zeros(())
        size = high.shape[1:3]
        window = resample(low, theta, size)
        visible = F.adaptive_avg_pool2d((~high_mask)[:, None].float(), size)[:, 0]
        if self.alignment == "cosine":
            similarity = F.cosine_similarity(self.predictor(window).float(), high.detach().float(), dim=-1)
            return ((1 - similarity) * visible).sum() / visible.sum()
        if taught_low is not None and taught_high is not None and self.alignment == "teacher":
            queries = _project(self.predictor, torch.cat([window, high.float()])).chunk(2)
            keys = self._keys(torch.cat([taught_high.float(), resample(taught_low, theta, size)])).chunk(2)
            return sum(info_nce(*pair, self.temperature) for pair in zip(queries, keys)) / 2
        share = (visible / visible.sum((1, 2), keepdim=True))[..., None]
        pooled = torch.stack([(window * share).sum((1, 2)), (high.float() * share).sum((1, 2))])
        # Normalised as the encoder's head does: a few strong channels would drown the rest.
        pooled = F.layer_norm(pooled, pooled.shape[-1:])
        return two_way_info_nce(*self.predictor(pooled).float(), self.temperature)

    @torch.no_grad()
    def _keys(self, maps: Tensor) -> Tensor:
        """The teacher's vectors, which queries are to find."""
        return _project(self.teacher["predictor"], maps)

    def _local_loss(self, batch: Mapping[str, Tensor], taught_low: Tensor | None) -> Tensor:
        if self.weights["local"] == 0 or taught_low is None:
            return batch["low"].new_zeros(())
        crops = batch["local"]
        maps = self.encoder.forward_features(crops.flatten(0, 1))
        queries = _project(self.predictor, maps).unflatten(0, crops.shape[:2])
        keys = self._keys(taught_low)
        losses = [info_nce(queries[:, i], keys, self.temperature) for i in range(crops.shape[1])]
        return torch.stack(losses).mean()

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
            if self._compares_views() and any(side % stride for side in images.shape[2:]):
                # The last map would reach beyond the view's edge, and `theta` would point beside the place.
                raise ValueError(
                    f"MAMIM: {view} has shape {tuple(images.shape)}; aligning views needs sides that are multiples of "
                    f"{stride} px: choose another img_size, or cross_weight=0 and cross_feature_weight=0"
                )
        if self.weights["local"] > 0 and (
            "local" not in batch or batch["local"].ndim != 5 or len(batch["local"]) != len(batch["low"])
        ):
            found = tuple(batch["local"].shape) if "local" in batch else "none"
            raise ValueError(
                f"MAMIM: local_weight needs local views (B, crops, 3, s, s), found {found}; set view_args.local_crops, "
                "or local_weight=0"
            )

    def _compares_views(self) -> bool:
        return self.weights["cross"] > 0 or self.weights["cross_feature"] > 0


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


def _normalised(patches: Tensor) -> Tensor:
    """Every patch with mean 0 and variance 1 over all of its values."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def _project(projector: nn.Module, maps: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, D): the mean over the view, normalised as the encoder's head does, and projected."""
    pooled = maps.float().mean((1, 2))
    return projector(F.layer_norm(pooled, pooled.shape[-1:])).float()


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
