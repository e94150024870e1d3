"""SSMamba: a hierarchical state space encoder for pathology images.

A convolutional stem and four stages at stride 4, 8, 16 and 32; every block is a Local Perception Residual (LPR), a
Directional Multi-scale scan (DMS) and an MLP. Activations are channels-last, (B, H, W, C). There is no class token and
no position table: any H x W works, at a cost linear in the pixels.

An independent implementation of the published description of SSMamba (arXiv:2604.15711; Medical Image Analysis 111,
2026): neither code nor weights of the paper are public. The README lists what the paper leaves open.
"""

# No `from __future__ import annotations`: torch.fx copies annotations into its graphs, and TorchScript, which may then
# script such a graph, knows the class Tensor but not its name.
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClNormMlpClassifierHead, LayerNorm, Mlp, register_notrace_module, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ssmamba_models.layers.block import Block
from ssmamba_models.layers.dms import DMS, DirectionalSSM  # noqa: F401
from ssmamba_models.layers.lpr import LPR  # noqa: F401
from ssmamba_models.layers.pieces import are_float32, is_inference, is_own, is_unwatched, piece_length
from ssmamba_models.models.published import check_cfg
from ssmamba_models.ops.bias_gelu import bias_gelu_
from ssmamba_models.weights import weight_source

__all__ = ["SSMamba"]


@register_notrace_module  # one node for torch.fx: how it works depends on the tensor
class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, each normalised.

    In inference on a CPU norms and activation of large maps work in place and in pieces (layers.pieces): the first map
    is the model's largest.

    Shape: (B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), dim).
    """

    def __init__(
        self, in_chans: int, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = LayerNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self._in_pieces(x):
            return self._forward_in_pieces(x)
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        x = self.act(self.norm1(x.permute(0, 2, 3, 1)))
        x = self.conv2(x.permute(0, 3, 1, 2))
        return self.norm2(x.permute(0, 2, 3, 1))

    @torch.jit.ignore
    def _in_pieces(self, x: Tensor) -> bool:
        if not (is_inference(x) and is_unwatched(self) and self._is_own()):
            return False
        tokens = x[:, 0].numel() // 4  # of the first map
        return piece_length(tokens, self.conv1.out_channels) < tokens

    @torch.jit.ignore
    def _forward_in_pieces(self, x: Tensor) -> Tensor:
        y = self.conv1(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        plain, width = y.dtype == torch.float32 and are_float32([self.norm1]), y.shape[-1]
        tokens = y.reshape(-1, width)
        for piece in tokens.split(piece_length(len(tokens), width)):
            if plain:
                normed = F.layer_norm(piece, (width,), self.norm1.weight, None, self.norm1.eps)
                piece.copy_(bias_gelu_(normed, self.norm1.bias))
            else:
                piece.copy_(self.act(self.norm1(piece)))
        y = self.conv2(tokens.view(y.shape).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        tokens = y.reshape(-1, y.shape[-1])
        for piece in tokens.split(piece_length(len(tokens), y.shape[-1])):
            piece.copy_(self.norm2(piece))
        return tokens.view(y.shape)

    def _is_own(self) -> bool:
        """Whether the layers are those that __init__ made: others may want the whole map, or hand on the caller's."""
        return (
            is_own(self.conv1, nn.Conv2d)
            and all(is_own(norm, LayerNorm) and norm.bias is not None for norm in (self.norm1, self.norm2))
            and is_own(self.act, nn.GELU)
            and self.act.approximate == "none"
        )


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 and a norm. Shape: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), dim_out)."""

    def __init__(
        self, dim: int, dim_out: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm(dim_out, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """A downsampling layer (none in the first stage) and blocks at one resolution.

    Shape: (B, H, W, C) -> (B, H', W', dim_out). `hold` is a mask (B, H', W') on the output grid, or None.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        drop_paths: list[float],
        scales: tuple[int, ...],
        d_state: int,
        mlp_ratio: float,
        drop: float,
        downsample: bool,
        scan_init: str = "silent",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = Downsample(dim, dim_out, **dd) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(dim_out, scales, d_state, mlp_ratio, drop, drop_path, scan_init, **dd) for drop_path in drop_paths
        )

    def forward(self, x: Tensor, hold: Tensor | None = None) -> Tensor:
        x = self.downsample(x)
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, hold)
            elif not torch.jit.is_scripting() and self._is_sole_owner(x, i):
                x = block(x, hold, overwrite=True)
            else:
                x = block(x, hold)
        return x

    @torch.jit.ignore
    def _is_sole_owner(self, x: Tensor, i: int) -> bool:
        """Whether `x`, which the i-th block is about to take in pieces, is a map that nobody else can hold.

        So it is if layers of our own made it and no hook has seen it. A block of another kind may not know `overwrite`.
        """
        block = self.blocks[i]
        if not (is_inference(x) and is_own(block, Block) and block.works_in_pieces(x)):
            return False
        maker = self.blocks[i - 1] if i > 0 else self.downsample
        # What a Downsample hands on is its norm's result; that of a block is always the block's own.
        is_ours = is_own(maker, Block) or (is_own(maker, Downsample) and is_own(maker.norm, LayerNorm))
        return is_ours and is_unwatched(maker)


class SSMamba(nn.Module):
    """SSMamba encoder with timm's interface.

    Args:
        in_chans: image channels.
        num_classes: width of the classifier; 0 for none, so that the model returns pooled features.
        global_pool: "avg", "max", "avgmax", or "" for none.
        dims, depths: width and number of blocks of each stage.
        scales: per stage, the pooling factors among which DMS splits its channels.
        d_state: states per channel and direction.
        scan_init: "silent" or "unit", how loud the scans are before training (see DMS); weights that are loaded decide
            themselves.
        mlp_ratio: hidden width of the MLPs over their width.
        drop_rate: dropout before the classifier. proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        device, dtype: of the parameters, as in torch.

    Shape: forward (B, in_chans, H, W) -> (B, num_classes), or (B, num_features) without classifier, or
    (B, h, w, num_features) without pooling; forward_features -> (B, h, w, num_features), h = ceil(H / 32) in steps of
    ceil(/2).

    Raises:
        ValueError: dims, depths and scales differ in length, or hold impossible values.

    Source: SSMamba (arXiv:2604.15711), as this project reads it.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (2, 3, 14, 3),
        scales: tuple[tuple[int, ...], ...] = ((1, 2), (1, 2), (1, 2), (1,)),
        d_state: int = 1,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        scan_init: str = "silent",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_geometry(in_chans, num_classes, dims, depths, scales, drop_path_rate)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_fmt = "NHWC"
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = []

        self.stem = Stem(in_chans, dims[0], **dd)
        last = max(sum(depths) - 1, 1)
        rates = [drop_path_rate * i / last for i in range(sum(depths))]
        self.stages = nn.Sequential()
        for i, depth in enumerate(depths):
            first = sum(depths[:i])
            self.stages.append(
                Stage(
                    dims[max(i - 1, 0)], dims[i], rates[first : first + depth], scales[i], d_state, mlp_ratio,
                    proj_drop_rate, i > 0, scan_init, **dd,
                )
            )
            self.feature_info.append({"num_chs": dims[i], "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.head = ClNormMlpClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=LayerNorm
        ).to(**dd)
        for module in self.modules():
            if isinstance(module, Mlp):
                trunc_normal_(module.fc1.weight, std=0.02)
                trunc_normal_(module.fc2.weight, std=0.02)
                nn.init.zeros_(module.fc1.bias)
                nn.init.zeros_(module.fc2.bias)
        self._init_classifier()

    def _init_classifier(self) -> None:
        if isinstance(self.head.fc, nn.Linear):
            trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters of the recurrence: decay would pull time scales and skips towards arbitrary values."""
        names = ("dt_bias", "A_log", "B_bias", "D")
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in names}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rate decay: the stem, then every block (coarse: every stage)."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stem",
            "blocks": [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier, an identity where there is none."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Give the model another classifier (0: none) and, if given, another pooling."""
        _check_classes(num_classes)
        self.num_classes = num_classes
        weight = self.stem.conv1.weight
        self.head.reset(num_classes, global_pool, reset_other=reset_other)
        self.head.to(device=weight.device, dtype=weight.dtype)
        self._init_classifier()

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of several stages in one pass.

        Args:
            x: (B, in_chans, H, W).
            indices: the last n stages if an int, all if None, else the stages with these indices.
            norm: ignored, as stages end without a norm that fits them; kept for timm's interface.
            stop_early: do not compute stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: do not return the final map.

        Returns:
            The final map (B, h, w, num_features) and the intermediates, or the intermediates alone.

        Raises:
            ValueError: output_fmt is neither.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f'output_fmt is {output_fmt!r}, expected "NCHW" or "NHWC"')
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > last:
                break
            x = stage(x)
            if i in take:
                intermediates.append(x.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one in `indices`, and the head (always, if stages were dropped: it fits the
        last stage alone). Returns the indices taken."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.head.in_features = self.head.num_features = self.num_features
        if prune_head or shortened:
            self.reset_classifier(0, "", reset_other=True)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, h, w, num_features), before norm and pooling."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, h, w, num_features) -> (B, num_classes); with `pre_logits` the pooled features (B, num_features)."""
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _check_classes(num_classes: int) -> None:
    if num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}, expected 0 (no classifier) or more")


def _check_geometry(
    in_chans: int,
    num_classes: int,
    dims: Sequence[int],
    depths: Sequence[int],
    scales: Sequence[Sequence[int]],
    drop_path_rate: float,
) -> None:
    _check_classes(num_classes)
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate is {drop_path_rate}, expected 0 or more and less than 1")
    if in_chans < 1:
        raise ValueError(f"in_chans is {in_chans}, expected at least 1")
    if not len(dims) == len(depths) == len(scales) or not dims:
        raise ValueError(
            f"dims, depths and scales hold {len(dims)}, {len(depths)} and {len(scales)} values, expected one per stage"
        )
    if min(dims) < 2 or min(depths) < 1:
        raise ValueError(f"dims is {dims} and depths is {depths}, expected widths of at least 2 and at least one block")


# Under which trainers put the state dict; the first that is there is taken.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """The state dict of a checkpoint that a trainer has wrapped: unpacked, without prefixes."""
    for key in WRAPPERS:
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    return {name.removeprefix("module.").removeprefix("encoder."): value for name, value in state_dict.items()}


def _cfg(url: str = "", **kwargs: Any) -> dict:
    return {
        "url": url,
        "num_classes": 0,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "ssmamba_tiny.mamim_lc25000": _cfg(**weight_source("ssmamba_tiny.mamim_lc25000")),
        "ssmamba_small.mamim_lc25000": _cfg(**weight_source("ssmamba_small.mamim_lc25000")),
        "ssmamba_base": _cfg(),
        "test_ssmamba": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _check_pretrained(variant: str, kwargs: dict) -> None:
    # Before the model is built: timm's own errors name neither the weights that exist nor a cure.
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if not (cfg.has_weights or cfg.state_dict):
        tagged = [f"{name}.{tag}" for name, default in default_cfgs.items() for tag in default.tags if tag]
        raise ValueError(f"{variant} has no trained weights; there are {', '.join(tagged)} (pretrained=False: random)")
    check_cfg(cfg.to_dict(), kwargs.get("cache_dir"))


def _create_ssmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> SSMamba:
    if pretrained:
        _check_pretrained(variant, kwargs)
    return build_model_with_cfg(
        SSMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def ssmamba_tiny(pretrained: bool = False, **kwargs: Any) -> SSMamba:
    """SSMamba-T: 9.12 M parameters, 384 features."""
    model_args = {"dims": (48, 96, 240, 384), "depths": (2, 2, 8, 2), "drop_path_rate": 0.05}
    return _create_ssmamba("ssmamba_tiny", pretrained, **(model_args | kwargs))


@register_model
def ssmamba_small(pretrained: bool = False, **kwargs: Any) -> SSMamba:
    """SSMamba-S: 25.31 M parameters, 512 features; the size that the paper reports."""
    model_args = {"dims": (64, 128, 320, 512), "depths": (2, 3, 14, 3), "drop_path_rate": 0.2}
    return _create_ssmamba("ssmamba_small", pretrained, **(model_args | kwargs))


@register_model
def ssmamba_base(pretrained: bool = False, **kwargs: Any) -> SSMamba:
    """SSMamba-B: 80.75 M parameters, 768 features."""
    model_args = {"dims": (96, 192, 480, 768), "depths": (3, 4, 24, 3), "drop_path_rate": 0.4}
    return _create_ssmamba("ssmamba_base", pretrained, **(model_args | kwargs))


@register_model
def test_ssmamba(pretrained: bool = False, **kwargs: Any) -> SSMamba:  # noqa: PT028 (a model, no test)
    """A model for tests: every part of the architecture, in milliseconds."""
    model_args = {"dims": (16, 24, 32, 48), "depths": (1, 1, 2, 1), "drop_path_rate": 0.0}
    return _create_ssmamba("test_ssmamba", pretrained, **(model_args | kwargs))
