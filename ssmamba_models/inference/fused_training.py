"""Training on a CPU with fused operators: the blocks of a model computed as a few operators that keep little.

A block's layers one by one store every activation for backward, and pass over it once more for each norm, activation
and residual. The operators here join these to the matrix products (ssmamba_models.ops.norm_linear, residual_mlp,
depthwise3x3) and recompute them backward. And where stochastic depth drops an image from a branch, the branch is not
computed for it (as in DINOv2, arXiv:2304.07193, sec. 5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from torch import Tensor, nn
from torch.autograd import forward_ad

from ssmamba_models.models.ssmamba import Block
from ssmamba_models.ops.depthwise import depthwise3x3
from ssmamba_models.ops.norm_linear import norm_linear
from ssmamba_models.ops.residual_mlp import residual_mlp
from ssmamba_models.ops.rowwise import is_served_by_c

Branch = Callable[[Tensor, "Tensor | None", float], Tensor]


def fuse_for_training(module: nn.Module) -> int:
    """Have every block of SSMamba in a module compute by fused operators, wherever these compute the same.

    Parameters, state dict, hooks on whole blocks, deep copies and random numbers stay as they are: a step has the same
    loss and gradients but for rounding. A block computes layer by layer, as before, whenever the operators could not
    stand for it: for tensors on other devices, without the C kernels, under torch.compile and torch.func, and where a
    layer inside was replaced (LoRA), or has hooks or a parametrisation. Module hooks that are global see blocks alone.

    Args:
        module: a model or whatever contains one, such as MAMIM with its decoder. Changed in place.

    Returns:
        How many blocks were changed. Classes derived from Block are left alone.

    Example::

        model = timm.create_model("ssmamba_small", num_classes=9)
        fuse_for_training(model)  # 22
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
    """
    blocks = [block for block in module.modules() if type(block) is Block]
    for block in blocks:
        block.__class__ = FusedBlock
    return len(blocks)


def unfuse(module: nn.Module) -> int:
    """Undo :func:`fuse_for_training`; returns how many blocks were changed."""
    blocks = [block for block in module.modules() if type(block) is FusedBlock]
    for block in blocks:
        block.__class__ = Block
    return len(blocks)


class FusedBlock(Block):
    """A Block that computes by fused operators where it can; made by :func:`fuse_for_training`."""

    def forward(self, x: Tensor, hold: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling() or not (_is_plain_call(x, hold) and _is_plain_block(self)):
            return super().forward(x, hold)
        conv = self.lpr.conv
        x = depthwise3x3(x, conv.weight, conv.bias, residual=True)
        x = _with_stochastic_depth(self.drop_path1, x, hold, self._add_scans)
        if self.training and self.mlp.drop1.p + self.mlp.drop2.p > 0:  # dropout is drawn for all images
            return x + self.drop_path2(self.mlp(self.norm2(x)))
        return _with_stochastic_depth(self.drop_path2, x, None, self._add_mlp)

    def _add_scans(self, x: Tensor, hold: Tensor | None, scale: float) -> Tensor:
        dms, norm = self.dms, self.norm1
        u = norm_linear(x, norm.weight, norm.bias, dms.in_proj.weight, norm.eps)
        u = depthwise3x3(u, dms.conv.weight, dms.conv.bias, silu=True)
        parts = [scan(part, hold) for scan, part in zip(dms.scans, torch.split(u, dms.widths, dim=-1))]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        norm = dms.norm
        return norm_linear(y, norm.weight, norm.bias, dms.out_proj.weight, norm.eps, residual=x, scale=scale)

    def _add_mlp(self, x: Tensor, hold: Tensor | None, scale: float) -> Tensor:
        norm, first, second = self.norm2, self.mlp.fc1, self.mlp.fc2
        return residual_mlp(
            x, norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias, norm.eps, scale
        )


def _with_stochastic_depth(path: nn.Module, x: Tensor, hold: Tensor | None, branch: Branch) -> Tensor:
    """x plus the branch, computed for the images that keep it; drawn as DropPath draws."""
    if not isinstance(path, DropPath) or not path.training or not path.drop_prob:
        return branch(x, hold, 1.0)
    share = 1 - path.drop_prob
    mask = x.new_empty((len(x), 1, 1, 1)).bernoulli_(share).flatten() > 0
    scale = 1 / share if share > 0 and path.scale_by_keep else 1.0
    if mask.all():
        return branch(x, hold, scale)
    kept, dropped = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    inside, outside = _Split.apply(x, kept, dropped)
    hold = None if hold is None else hold[kept]
    return _Merge.apply(branch(inside, hold, scale), outside, kept, dropped)


def _merged(inside: Tensor, outside: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
    whole = inside.new_empty((len(inside) + len(outside), *inside.shape[1:]))
    return whole.index_copy_(0, kept, inside).index_copy_(0, dropped, outside)


class _Split(torch.autograd.Function):
    """A batch's images that keep a branch, and the others; their gradients come together without additions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(kept, dropped)
        return x[kept], x[dropped]

    @staticmethod
    def backward(ctx: Any, inside: Tensor, outside: Tensor) -> tuple[Tensor, None, None]:
        return _merged(inside, outside, *ctx.saved_tensors), None, None


class _Merge(torch.autograd.Function):
    """The inverse of _Split."""

    @staticmethod
    def forward(ctx: Any, inside: Tensor, outside: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
        ctx.save_for_backward(kept, dropped)
        return _merged(inside, outside, kept, dropped)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        kept, dropped = ctx.saved_tensors
        return grad[kept], grad[dropped], None, None


def _is_plain_call(x: Tensor, hold: Tensor | None) -> bool:
    """Whether the operators can take this input: numbers in memory, in a type of the C kernels, without tangents."""
    if type(x) not in (Tensor, nn.Parameter) or torch.jit.is_tracing() or x.dim() != 4 or not is_served_by_c(x):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(x).tangent is not None:
        return False
    # A mask that does not fit is for the layers to refuse.
    return hold is None or (type(hold) is Tensor and hold.dtype == torch.bool and hold.shape == x.shape[:3])


# Of each kind of layer inside a block: where it stands.
_LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    LayerNorm: ("norm1", "dms.norm", "norm2"),
    nn.Linear: ("dms.in_proj", "dms.out_proj", "mlp.fc1", "mlp.fc2"),
    nn.Conv2d: ("lpr.conv", "dms.conv"),
    nn.SiLU: ("dms.act",),
    Mlp: ("mlp",),
    nn.GELU: ("mlp.act",),
    nn.Dropout: ("mlp.drop1", "mlp.drop2"),
}


def _is_plain_block(block: nn.Module) -> bool:
    """Whether the layers that the operators stand for are those of the constructor, and nobody watches them."""
    ours = [block.get_submodule(name) for name in ("lpr", "dms")]
    if any(not type(layer).__module__.startswith("ssmamba_models.") or _is_watched(layer) for layer in ours):
        return False
    for kind, names in _LAYERS.items():
        for name in names:
            layer = block.get_submodule(name)
            if type(layer) is not kind or _is_watched(layer):
                return False
    paths = (block.drop_path1, block.drop_path2)
    if any(type(path) not in (nn.Identity, DropPath) or _is_watched(path) for path in paths):
        return False
    if type(block.mlp.norm) is not nn.Identity or _is_watched(block.mlp.norm) or block.mlp.act.approximate != "none":
        return False
    return _has_plain_parameters(block) and all(_is_depthwise(conv) for conv in (block.lpr.conv, block.dms.conv))


def _is_watched(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in vars(layer)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), "zeros") and conv.groups == len(conv.weight)


def _has_plain_parameters(block: nn.Module) -> bool:
    """Whether there is a bias where the operators want one, none where they know none, and all are plain float32."""
    dms, mlp = block.dms, block.mlp
    if not (dms.in_proj.bias is None and dms.out_proj.bias is None and mlp.fc1.bias is not None):
        return False
    if mlp.fc2.bias is None or any(t is None for n in (block.norm1, dms.norm, block.norm2) for t in (n.weight, n.bias)):
        return False
    return all(type(p) in (nn.Parameter, Tensor) and p.dtype == torch.float32 for p in block.parameters())
