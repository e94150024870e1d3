"""SSMamba: a hierarchical state space encoder for pathology images.

A convolutional stem and four stages at stride 4, 8, 16 and 32; every block is a Local Perception Residual (LPR), a
Directional Multi-scale module (DMS) and an MLP. Feature maps are channels-last, (B, H, W, C). There is no class token
and no position table: any H x W works, at a cost linear in the pixels.

An independent implementation of the published description of SSMamba (arXiv:2604.15711; Medical Image Analysis 111,
2026): neither code nor weights of the paper are public. The README lists what the paper leaves open.
"""

# No `from __future__ import annotations`: torch.fx copies annotations into its graphs, and TorchScript, which may then
# script such a graph, knows the class Tensor but not its name.
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp, register_notrace_module, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ssmamba_models.models import arguments, checkpoints
from ssmamba_models.models.timm_encoder import TimmEncoder
from ssmamba_models.ops import directional_scan
from ssmamba_models.ops.reference import DIRECTIONS

__all__ = ["DMS", "LPR", "Block", "DirectionalSSM", "Downsample", "Head", "SSMamba", "Stage", "Stem", "pool_hold"]


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, each followed by a LayerNorm, with GELU between them.

    Shape: (B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), dim).
    """

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = LayerNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # From here on NCHW maps are views of NHWC memory: no later layer has to copy.
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        x = self.act(self.norm1(x.permute(0, 2, 3, 1)))
        x = self.conv2(x.permute(0, 3, 1, 2))
        return self.norm2(x.permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 and a LayerNorm. Shape: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), dim_out)."""

    def __init__(self, dim: int, dim_out: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm(dim_out, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class LPR(nn.Module):
    """Local Perception Residual: x + DWConv3x3(x), un-normalised.

    A depthwise convolution with zero padding encodes position: the neighbourhood of each token, and its distance to the
    border. It is translation invariant inside the map and works at any size.

    Args:
        dim: width C.
        dd: device and dtype of the parameters.

    Shape: (B, H, W, C) -> (B, H, W, C).

    Source: SSMamba (arXiv:2604.15711), LPR; the form is CMT's local perception unit (arXiv:2107.06263, eq. 2).
    """

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kernels with a standard deviation of 0.02: LPR starts near the identity."""
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pool_hold(hold: Tensor, scale: int) -> Tensor:
    """Downsample a hold mask: a pooled token is held if all of its tokens are.

    Shape: (B, H, W) bool -> (B, ceil(H / scale), ceil(W / scale)) bool.
    """
    return F.max_pool2d((~hold)[:, None].float(), scale, ceil_mode=True)[:, 0] == 0


@register_notrace_module  # one node for torch.fx: what the scan checks depends on the tensors
class DirectionalSSM(nn.Module):
    """The selective scan of one scale: pool, project, scan in four directions, sum, upsample.

    With V the input at 1/scale of its resolution, width D::

        [r, b_1..4, c_1..4] = V W_x
        delta_k = softplus(r W_delta + tau_k)
        h_t = exp(delta_t A_k) h_(t-1) + delta_t (b_(k,t) + beta_k) V_t,   A_k = -exp(alpha_k)
        Y = d * V + sum_k c_k . h

    Args:
        dim: D, the width of this scale.
        dt_rank: rank of W_delta.
        d_state: N, the states of each channel.
        scale: 1, or the factor by which the map is average-pooled before the scan.
        scan_init: "silent" or "unit", see :class:`DMS`.
        dd: device and dtype of the parameters.

    Shape: (B, H, W, D) and a hold mask (B, H, W) or None -> (B, H, W, D).

    Source: SSMamba (arXiv:2604.15711), DMS, as this project reads it; scan and parameters as VMamba v05
    (arXiv:2401.10166), scales as MSVMamba (arXiv:2405.14174).
    """

    def __init__(
        self, dim: int, dt_rank: int, d_state: int = 1, scale: int = 1, scan_init: str = "silent", **dd: Any
    ) -> None:
        super().__init__()
        self.scale, self.d_state, self.dt_rank, self.scan_init = scale, d_state, dt_rank, scan_init
        self.directions = DIRECTIONS
        self.x_proj = nn.Linear(dim, dt_rank + 2 * DIRECTIONS * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(dt_rank, dim, bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(DIRECTIONS, dim, **dd))  # tau
        self.A_log = nn.Parameter(torch.empty(DIRECTIONS, dim, d_state, **dd))  # alpha
        self.B_bias = nn.Parameter(torch.empty(DIRECTIONS, d_state, **dd))  # beta
        self.D = nn.Parameter(torch.empty(dim, **dd))  # d
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """softplus(tau) log-uniform in [1e-3, 0.1]; alpha log(1..N), which is 0 for one state; d 1.

        W_x has a standard deviation of 0.02 and beta is 0 ("silent"), or D ** -0.5 and 1 ("unit").
        """
        unit = self.scan_init == "unit"
        trunc_normal_(self.x_proj.weight, std=self.x_proj.in_features**-0.5 if unit else 0.02)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        states = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.constant_(self.B_bias, 1.0 if unit else 0.0)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, hold: Tensor | None = None) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        if self.scale > 1:
            pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.scale, ceil_mode=True, count_include_pad=False)
            v = pooled.permute(0, 2, 3, 1)
            if hold is not None:
                hold = pool_hold(hold, self.scale)
        else:
            v = x
        states = self.directions * self.d_state
        r, b, c = torch.split(self.x_proj(v), [self.dt_rank, states, states], dim=-1)
        b, c = b.unflatten(-1, (self.directions, self.d_state)), c.unflatten(-1, (self.directions, self.d_state))
        delta = self.dt_proj(r)
        b = b + self.B_bias.to(b.dtype)
        # The scan's own precision: float32, and float64 for float64 alone.
        wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        A = -torch.exp(self.A_log.to(wide))
        if torch.jit.is_scripting():
            # TorchScript's promotion differs from eager mode's under autocast; the operator wants one dtype.
            delta, b, c = delta.to(v.dtype), b.to(v.dtype), c.to(v.dtype)
            y = torch.ops.ssmamba.directional_scan(v, delta, A, b, c, self.D.to(wide), self.dt_bias.to(wide), hold)
        else:
            y = directional_scan(v, delta, A, b, c, self.D, self.dt_bias, hold)
        if self.scale > 1:
            y = F.interpolate(y.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=False)
            y = y.permute(0, 2, 3, 1)
        return y


class DMS(nn.Module):
    """Directional Multi-scale module.

    ``u = SiLU(DWConv3x3(x W_in))``; the channels of u are split among the scales, each is scanned by a
    :class:`DirectionalSSM`; ``DMS(x) = LN([Y_1; Y_2; ...]) W_out``.

    Args:
        dim: width C.
        scales: pooling factor of each scale; (1, 2) scans half of the channels at full and half at half resolution.
        d_state: states per channel N.
        dt_rank: rank of the step size projection; default max(4, ceil(C / 16)).
        scan_init: initial gain of the state space model. "silent": near zero, with W_in and W_x of a standard deviation
            of 0.02 and beta 0; the states add some 1e-5 to d * V, and a short training learns without them. "unit":
            inputs of unit variance and beta 1; the states add some tenths.
        dd: device and dtype of the parameters.

    Shape: (B, H, W, C) and a hold mask (B, H, W) or None -> (B, H, W, C). Where the mask is True the step size is 0
    and the state passes through unchanged.

    Raises:
        ValueError: fewer channels than scales, a scale, d_state or dt_rank below 1, an unknown scan_init, or a hold
            mask of another shape.
        TypeError: a hold mask that is not bool.

    Source: SSMamba (arXiv:2604.15711), DMS, as this project reads it.

    Example::

        y = DMS(64, scales=(1, 2))(torch.randn(2, 56, 56, 64))  # (2, 56, 56, 64)
    """

    def __init__(
        self, dim: int, scales: tuple[int, ...] = (1, 2), d_state: int = 1, dt_rank: int | None = None,
        scan_init: str = "silent", **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        arguments.check_dms(dim, scales, d_state, dt_rank, scan_init)
        dt_rank = dt_rank or max(4, math.ceil(dim / 16))
        self.scan_init = scan_init
        self.widths = [dim // len(scales)] * len(scales)
        self.widths[-1] += dim - sum(self.widths)
        self.in_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.act = nn.SiLU(inplace=True)
        self.scans = nn.ModuleList(
            DirectionalSSM(width, dt_rank, d_state, scale, scan_init, **dd) for width, scale in zip(self.widths, scales)
        )
        self.norm = LayerNorm(dim, **dd)
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W_in and W_out, and no bias of the convolution; the layers inside initialise the rest."""
        std = self.in_proj.in_features**-0.5 if self.scan_init == "unit" else 0.02
        trunc_normal_(self.in_proj.weight, std=std)
        trunc_normal_(self.out_proj.weight, std=0.02)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, hold: Tensor | None = None) -> Tensor:
        if hold is not None and not torch.jit.is_scripting():
            arguments.check_hold(hold, x)
        u = self.act(self.conv(self.in_proj(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        parts = torch.split(u, self.widths, dim=-1)
        y: list[Tensor] = []
        for i, scan in enumerate(self.scans):
            y.append(scan(parts[i], hold))
        return self.out_proj(self.norm(torch.cat(y, dim=-1)))


class Block(nn.Module):
    """LPR, then DMS and MLP as pre-norm residual branches.

    Args:
        dim: width C.
        scales, d_state, scan_init: see :class:`DMS`.
        mlp_ratio: hidden width of the MLP over its width.
        drop: dropout in the MLP. drop_path: stochastic depth rate of both branches.
        dd: device and dtype of the parameters.

    Shape: (B, H, W, C) and a hold mask (B, H, W) or None -> (B, H, W, C).
    """

    def __init__(
        self, dim: int, scales: tuple[int, ...], d_state: int = 1, mlp_ratio: float = 4.0, drop: float = 0.0,
        drop_path: float = 0.0, scan_init: str = "silent", **dd: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.lpr = LPR(dim, **dd)
        self.norm1 = LayerNorm(dim, **dd)
        self.dms = DMS(dim, scales, d_state, scan_init=scan_init, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, hold: Tensor | None = None) -> Tensor:
        x = self.lpr(x)
        x = x + self.drop_path1(self.dms(self.norm1(x), hold))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A downsampling layer (none in the first stage) and blocks at one resolution.

    Args:
        dim, dim_out: width of the input, and of the blocks.
        downsample: whether to halve the resolution.
        drop_paths: stochastic depth rate of each block.
        dd: device and dtype of the parameters.
        block: the other arguments of :class:`Block`.

    Shape: (B, H, W, dim) and a hold mask (B, H', W') on the output grid, or None -> (B, H', W', dim_out).
    """

    def __init__(
        self, dim: int, dim_out: int, downsample: bool, drop_paths: list[float], dd: dict[str, Any], **block: Any
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = Downsample(dim, dim_out, **dd) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(Block(dim_out, drop_path=rate, **block, **dd) for rate in drop_paths)

    def forward(self, x: Tensor, hold: Tensor | None = None) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, hold)
            else:
                x = block(x, hold)
        return x


class Head(nn.Module):
    """Global pooling, LayerNorm, dropout and a linear classifier.

    Args:
        in_features: width C of the map.
        num_classes: of the classifier; 0 for none.
        pool_type: "avg", "max", their mean "avgmax", both beside each other "catavgmax", or "" for none. With
            "catavgmax" mean and maximum are normalised each for itself, so that trained norms fit any pooling.
        drop_rate: dropout before the classifier.
        dd: device and dtype of the parameters.

    Attributes:
        num_features: width of the classifier's input: C, or 2C with "catavgmax".

    Shape: (B, H, W, C) -> (B, num_classes), or (B, num_features) without classifier or with `pre_logits`. Without
    pooling (B, H, W, num_classes or C).

    Raises:
        ValueError: an unknown pool_type.
    """

    def __init__(self, in_features: int, num_classes: int, pool_type: str, drop_rate: float, **dd: Any) -> None:
        super().__init__()
        self.in_features, self.pool_type = in_features, arguments.check_pool(pool_type)
        self.norm = LayerNorm(in_features, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, **dd)

    def reset(
        self, num_classes: int, pool_type: str | None = None, reset_other: bool = False, in_features: int = 0, **dd: Any
    ) -> None:
        """Make a new classifier; change pooling and input width if given; with `reset_other` drop the norm."""
        self.pool_type = self.pool_type if pool_type is None else arguments.check_pool(pool_type)
        self.in_features = in_features or self.in_features
        self.num_features = self.in_features * (2 if self.pool_type == "catavgmax" else 1)
        if reset_other:
            self.norm = nn.Identity().train(self.training)  # type: ignore[assignment]
        self.fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool_type == "avg":
            x = x.mean((1, 2))
        elif self.pool_type == "max":
            x = x.amax((1, 2))
        elif self.pool_type == "avgmax":
            x = 0.5 * (x.amax((1, 2)) + x.mean((1, 2)))
        elif self.pool_type == "catavgmax":
            x = torch.stack((x.mean((1, 2)), x.amax((1, 2))), 1)
        x = self.norm(x)
        if self.pool_type == "catavgmax":
            x = x.flatten(1)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class SSMamba(TimmEncoder):
    """SSMamba encoder with timm's interface.

    Args:
        in_chans: image channels.
        num_classes: width of the classifier; 0 for none, so that the model returns pooled features.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none, see :class:`Head`.
        dims, depths: width and number of blocks of each stage.
        scales: per stage, the pooling factors among which DMS splits its channels.
        d_state: states per channel and direction.
        scan_init: "silent" or "unit", the initial gain of the scans (see DMS); loaded weights override it.
        mlp_ratio: hidden width of the MLPs over their width.
        drop_rate: dropout before the classifier. proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        device, dtype: of the parameters.

    Attributes:
        num_features: width of the last feature map.
        head_hidden_size: width of the pooled features: num_features, or twice that with "catavgmax".

    Shape: forward (B, in_chans, H, W) -> (B, num_classes), or (B, head_hidden_size) without classifier, or
    (B, h, w, num_features) without pooling; forward_features -> (B, h, w, num_features), h = ceil(H / 32).

    Raises:
        ValueError: dims, depths and scales differ in length, or hold impossible values.

    Source: SSMamba (arXiv:2604.15711), as this project reads it.

    Example::

        model = timm.create_model("ssmamba_small", pretrained=True, num_classes=0).eval()
        features = model(torch.randn(2, 3, 224, 224))  # (2, 512)
    """

    def __init__(
        self, in_chans: int = 3, num_classes: int = 0, global_pool: str = "avg",
        dims: tuple[int, ...] = (64, 128, 320, 512), depths: tuple[int, ...] = (2, 3, 14, 3),
        scales: tuple[tuple[int, ...], ...] = ((1, 2), (1, 2), (1, 2), (1,)), d_state: int = 1, mlp_ratio: float = 4.0,
        drop_rate: float = 0.0, proj_drop_rate: float = 0.0, drop_path_rate: float = 0.0, scan_init: str = "silent",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        arguments.check_encoder(in_chans, num_classes, dims, depths, scales, drop_path_rate)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features = dims[-1]
        self.feature_info = []

        self.stem = Stem(in_chans, dims[0], **dd)
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        self.stages = nn.Sequential()
        for i, dim in enumerate(dims):
            drop_paths, rates = rates[: depths[i]], rates[depths[i] :]
            self.stages.append(
                Stage(
                    dims[max(i - 1, 0)], dim, i > 0, drop_paths, dd, scales=scales[i], d_state=d_state,
                    mlp_ratio=mlp_ratio, drop=proj_drop_rate, scan_init=scan_init,
                )
            )
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, h, w, num_features), before pooling and norm."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, h, w, num_features) -> (B, num_classes); with `pre_logits` pooled features (B, head_hidden_size)."""
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs(
    {
        "ssmamba_tiny.mamim_lc25000": checkpoints.mamim_cfg("ssmamba_tiny.mamim_lc25000"),
        "ssmamba_small.mamim_lc25000": checkpoints.mamim_cfg("ssmamba_small.mamim_lc25000"),
        "ssmamba_base": checkpoints.random_cfg(),
        "test_ssmamba": checkpoints.random_cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create_ssmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> SSMamba:
    if pretrained:
        checkpoints.check_weights(variant, default_cfgs, kwargs)
    return build_model_with_cfg(
        SSMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoints.checkpoint_filter_fn,
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
