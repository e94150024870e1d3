"""Training on a CPU with fused operators: the blocks of a model computed as a few operators that keep little.

A block's layers one by one store every activation for backward, and pass over it once more for each norm, activation
and residual. The branches here (ssmamba_models.inference.branches) join these to the matrix products and recompute them
backward. And where stochastic depth drops an image from a branch, the branch is not
computed for it (as in DINOv2, arXiv:2304.07193, sec. 5).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from torch import Tensor, nn
from torch.autograd import forward_ad

from ssmamba_models.inference.branches import LocalPerception, MlpBranch, ScanBranch, ScanSizes, scan_parameters
from ssmamba_models.models.ssmamba import DMS, LPR, Block, DirectionalSSM
from ssmamba_models.ops.rowwise import is_served_by_c


def fuse_for_training(module: nn.Module) -> int:
    """Have every block of SSMamba in a module compute by fused operators, wherever these compute the same.

    Parameters, state dict, hooks on whole blocks, deep copies and random numbers stay as they are: a step has the same
    loss and gradients but for rounding. A block computes layer by layer, as before, whenever the operators could not
    stand for it: for tensors on other devices, without the C kernels, under torch.compile and torch.func, and where a
    layer inside was replaced (LoRA), or has hooks or a parametrisation. Module hooks that are global see blocks alone.

    Gradients of gradients (`create_graph=True`) and torch.jit.script need the layers: call :func:`unfuse` first.

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
    """Undo :func:`fuse_for_training`.

    Args:
        module: a model or whatever contains one. Changed in place.

    Returns:
        How many blocks were changed.
    """
    blocks: list[Any] = [block for block in module.modules() if type(block) is FusedBlock]
    for block in blocks:
        block.__class__ = Block
    return len(blocks)


class FusedBlock(Block):
    """A Block that computes by fused operators where it can; made by :func:`fuse_for_training`."""

    def forward(self, x: Tensor, hold: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling() or not (_is_plain_call(x, hold) and _is_plain_block(self)):
            return super().forward(x, hold)
        if torch.is_autocast_enabled("cpu"):  # a convolution comes first, so that all of the block is in this type
            x = x.to(torch.get_autocast_dtype("cpu"))
        conv, dms, mlp = self.lpr.conv, self.dms, self.mlp
        scans: list[Any] = list(dms.scans)
        x = LocalPerception.apply(x, conv.weight, conv.bias)
        kept, scale = _draw(self.drop_path1, x)
        norms = (self.norm1.weight, self.norm1.bias, dms.norm.weight, dms.norm.bias)
        shared = (*norms, dms.in_proj.weight, dms.conv.weight, dms.conv.bias, dms.out_proj.weight)
        own = [parameter for scan in scans for parameter in scan_parameters(scan)]
        sizes = ScanSizes(tuple(scan.scale for scan in scans), tuple(dms.widths), self.norm1.eps, dms.norm.eps)
        x = ScanBranch.apply(x, hold, kept, scale, sizes, *shared, *own)
        if self.training and mlp.drop1.p + mlp.drop2.p > 0:  # dropout is drawn for all images
            return x + self.drop_path2(mlp(self.norm2(x)))
        kept, scale = _draw(self.drop_path2, x)
        return MlpBranch.apply(
            x, kept, scale, self.norm2.eps, self.norm2.weight, self.norm2.bias,
            mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
        )  # fmt: skip


def _draw(path: nn.Module, x: Tensor) -> tuple[Tensor | None, float]:
    """Which images keep a branch (None: all), and what the branch is multiplied by: drawn as DropPath draws."""
    if not isinstance(path, DropPath) or not path.training or not path.drop_prob:
        return None, 1.0
    share = 1 - path.drop_prob
    mask = x.new_empty((len(x), 1, 1, 1)).bernoulli_(share).flatten() > 0
    scale = 1 / share if share > 0 and path.scale_by_keep else 1.0
    return (None if mask.all() else mask.nonzero().flatten()), scale


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
    LPR: ("lpr",),
    DMS: ("dms",),
    nn.ModuleList: ("dms.scans",),
    LayerNorm: ("norm1", "dms.norm", "norm2"),
    nn.Linear: ("dms.in_proj", "dms.out_proj", "mlp.fc1", "mlp.fc2"),
    nn.Conv2d: ("lpr.conv", "dms.conv"),
    nn.SiLU: ("dms.act",),
    Mlp: ("mlp",),
    nn.GELU: ("mlp.act",),
    nn.Dropout: ("mlp.drop1", "mlp.drop2"),
    nn.Identity: ("mlp.norm",),
}


def _is_plain_block(block: Any) -> bool:
    """Whether all layers inside are those of the constructor, and nobody watches them."""
    modules = dict(block.named_modules())
    kinds = {name: kind for kind, names in _LAYERS.items() for name in names}
    for name, layer in modules.items():
        if name and (not _is_kind(name, layer, kinds) or _is_watched(layer)):
            return False
    if not kinds.keys() <= modules.keys() or block.mlp.act.approximate != "none":
        return False
    return _has_plain_parameters(block) and all(_is_depthwise(conv) for conv in (block.lpr.conv, block.dms.conv))


def _is_kind(name: str, layer: nn.Module, kinds: dict[str, type[nn.Module]]) -> bool:
    if name in kinds:
        return type(layer) is kinds[name]
    if name.startswith("dms.scans."):
        return type(layer) is (nn.Linear if name.endswith("_proj") else DirectionalSSM)
    return name in ("drop_path1", "drop_path2") and type(layer) in (nn.Identity, DropPath)


def _is_watched(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in vars(layer)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), "zeros") and conv.groups == len(conv.weight)


def _has_plain_parameters(block: Any) -> bool:
    """Whether there is a bias where the operators want one, none where they know none, and all are plain float32."""
    dms, mlp = block.dms, block.mlp
    if not (dms.in_proj.bias is None and dms.out_proj.bias is None and mlp.fc1.bias is not None):
        return False
    if any(linear.bias is not None for scan in dms.scans for linear in (scan.x_proj, scan.dt_proj)):
        return False
    if mlp.fc2.bias is None or any(t is None for n in (block.norm1, dms.norm, block.norm2) for t in (n.weight, n.bias)):
        return False
    return all(_is_plain_parameter(p) for p in block.parameters())


def _is_plain_parameter(p: Tensor) -> bool:
    readable = p.dim() > 1 or (p.is_contiguous() and p.data_ptr() % p.element_size() == 0)
    return type(p) in (nn.Parameter, Tensor) and p.dtype == torch.float32 and readable
