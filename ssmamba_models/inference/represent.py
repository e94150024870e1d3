"""From an SSMamba to the structs of its plan; what they cannot represent is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from torch import Tensor, nn

from ssmamba_models.inference.fused_training import FusedBlock
from ssmamba_models.models import ssmamba as architecture
from ssmamba_models.ops.cpu import plan


class OptimizeError(ValueError):
    """A model that a plan cannot represent."""


_PLAIN = {nn.ModuleList, nn.Sequential, nn.Identity, nn.Linear, nn.Conv2d, nn.GELU, nn.SiLU, nn.Dropout}
_PLAIN |= {LayerNorm, Mlp, DropPath}


def check_representable(model: Any) -> None:
    """Raises OptimizeError if anything in the encoder is not what SSMamba's own constructor builds."""
    if type(model) is not architecture.SSMamba:
        raise OptimizeError(
            f"the model is {type(model).__name__}, derived from SSMamba; a plan would leave out what that adds"
        )
    for name, module in _encoder_modules(model):
        _check_module(name, module)
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            continue
        if type(parameter) not in (nn.Parameter, Tensor) or not parameter.is_floating_point():
            raise OptimizeError(f"{name} is {type(parameter).__name__} {parameter.dtype}, expected plain numbers")


def _encoder_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """All modules but the head, which runs as it is."""
    for name, module in model.named_modules():
        if not name.startswith("head"):
            yield name, module


def _check_module(name: str, module: Any) -> None:
    what = name or "the model"
    if not (type(module) in _PLAIN | {FusedBlock} or type(module).__module__ == architecture.__name__):
        raise OptimizeError(f"{what} is {type(module).__module__}.{type(module).__name__}: it was replaced; {_CURE}")
    if own := [attribute for attribute in vars(module) if attribute.startswith("forward")]:
        raise OptimizeError(f"{what} has a {own[0]} of its own; {_CURE}")
    if module.training:
        raise OptimizeError(f"{what} is in training mode; call model.eval() first")
    if module._forward_hooks or module._forward_pre_hooks:
        raise OptimizeError(f"{what} has forward hooks, which a plan would not call; remove them first")


_CURE = "merge or undo it first, or run the model as it is"


def _expect(name: str, module: Any, kind: type) -> None:
    if type(module) is not kind:
        raise OptimizeError(f"{name} is {type(module).__name__}, expected {kind.__name__}; {_CURE}")


def build_network(model: Any, packer: plan.Packer, linears: plan.Packer) -> plan.Network:
    """Pack a checked model.

    Args:
        model: of which `check_representable` has nothing to say.
        packer: keeps the packed weights.
        linears: keeps those of the blocks' linear layers (in_proj, out_proj, fc1, fc2).

    Raises:
        OptimizeError: a layer is not of the kind, or has not the geometry, that the operators compute.
    """
    stem = model.stem
    _expect("stem", stem, architecture.Stem)
    _check_convolution("stem.conv1", stem.conv1)
    _expect("stem.act", stem.act, nn.GELU)
    _check_gelu("stem.act", stem.act)
    stages = [_stage(i, stage, stem, packer, linears) for i, stage in enumerate(model.stages)]
    if len(stages) > plan.MAX_STAGES:
        raise OptimizeError(f"the model has {len(stages)} stages, expected at most {plan.MAX_STAGES}")
    return plan.Network(
        stem.conv1.in_channels, stem.conv1.out_channels,
        packer.linear(stem.conv1.weight.flatten(1), stem.conv1.bias),
        _norm("stem.norm1", stem.norm1, packer),
        len(stages), packer.array(plan.Stage, stages),
    )  # fmt: skip


def _stage(index: int, stage: Any, stem: Any, packer: plan.Packer, linears: plan.Packer) -> plan.Stage:
    name = f"stages.{index}"
    _expect(name, stage, architecture.Stage)
    _expect(f"{name}.downsample", stage.downsample, architecture.Downsample if index else nn.Identity)
    if index == 0:
        conv, norm, where = stem.conv2, stem.norm2, "stem.conv2"
    else:
        conv, norm, where = stage.downsample.conv, stage.downsample.norm, f"{name}.downsample.conv"
    _check_convolution(where, conv)
    weight = conv.weight.detach().permute(0, 2, 3, 1).flatten(1)  # in the order of the map
    blocks = [_block(f"{name}.blocks.{i}", block, packer, linears) for i, block in enumerate(stage.blocks)]
    return plan.Stage(
        conv.out_channels, packer.linear(weight, conv.bias), _norm(f"{where}'s norm", norm, packer),
        len(blocks), packer.array(plan.Block, blocks),
    )  # fmt: skip


def _block(name: str, block: Any, packer: plan.Packer, linears: plan.Packer) -> plan.Block:
    if type(block) is not FusedBlock:  # a training's, which computes the same
        _expect(name, block, architecture.Block)
    dms, mlp = block.dms, block.mlp
    for part, module, kind in (("lpr", block.lpr, architecture.LPR), ("dms", dms, architecture.DMS), ("mlp", mlp, Mlp)):
        _expect(f"{name}.{part}", module, kind)
    _expect(f"{name}.mlp.act", mlp.act, nn.GELU)
    _expect(f"{name}.mlp.norm", mlp.norm, nn.Identity)
    _expect(f"{name}.dms.act", dms.act, nn.SiLU)
    _check_gelu(f"{name}.mlp.act", mlp.act)
    for part, linear in (("dms.in_proj", dms.in_proj), ("dms.out_proj", dms.out_proj), ("mlp.fc1", mlp.fc1),
                         ("mlp.fc2", mlp.fc2)):  # fmt: skip
        _expect(f"{name}.{part}", linear, nn.Linear)
    for part, drop in (("mlp.drop1", mlp.drop1), ("mlp.drop2", mlp.drop2)):
        _expect(f"{name}.{part}", drop, nn.Dropout)
    for part, norm in (("norm1", block.norm1), ("dms.norm", dms.norm), ("norm2", block.norm2)):
        _expect(f"{name}.{part}", norm, LayerNorm)
    for part, path in (("drop_path1", block.drop_path1), ("drop_path2", block.drop_path2)):
        if type(path) not in (nn.Identity, DropPath):
            raise OptimizeError(f"{name}.{part} is {type(path).__name__}, expected Identity or DropPath; {_CURE}")
    for part, conv in (("lpr.conv", block.lpr.conv), ("dms.conv", dms.conv)):
        _check_depthwise(f"{name}.{part}", conv)
    if len(dms.scans) > plan.MAX_SCANS:
        raise OptimizeError(f"{name} has {len(dms.scans)} scales, expected at most {plan.MAX_SCANS}")
    scans, offset = [], 0
    for scan in dms.scans:
        _expect(f"{name}.dms.scans", scan, architecture.DirectionalSSM)
        for part, linear in (("x_proj", scan.x_proj), ("dt_proj", scan.dt_proj)):
            _expect(f"{name}.dms.scans.{part}", linear, nn.Linear)
            if linear.bias is not None:
                raise OptimizeError(f"{name}.dms.scans.{part} has a bias, expected none; {_CURE}")
        scans.append(packer.scan(scan.scale, offset, dict(scan.named_parameters())))
        offset += scans[-1].width
    return plan.Block(
        packer.depthwise(block.lpr.conv.weight, block.lpr.conv.bias, residual=True),
        packer.depthwise(dms.conv.weight, dms.conv.bias, residual=False),
        block.norm1.eps, dms.norm.eps, block.norm2.eps,
        _after(block.norm1, dms.in_proj, linears), _after(dms.norm, dms.out_proj, linears),
        _after(block.norm2, mlp.fc1, linears), linears.linear(mlp.fc2.weight, mlp.fc2.bias),
        len(scans), packer.array(plan.Scan, scans),
    )  # fmt: skip


def _after(norm: Any, linear: Any, packer: plan.Packer) -> plan.Linear:
    """A linear layer with the affine part of the norm before it."""
    return packer.linear(linear.weight, linear.bias, norm.weight, norm.bias)


def _norm(name: str, norm: Any, packer: plan.Packer) -> plan.Norm:
    _expect(name, norm, LayerNorm)
    width = norm.normalized_shape[0]
    weight = torch.ones(width, dtype=torch.float32, device="cpu") if norm.weight is None else norm.weight
    bias = torch.zeros(width, dtype=torch.float32, device="cpu") if norm.bias is None else norm.bias
    return packer.norm(weight, bias, norm.eps)


def _check_gelu(name: str, act: Any) -> None:
    if act.approximate != "none":
        raise OptimizeError(f"{name} approximates GELU by {act.approximate}, expected the exact one; {_CURE}")


def _check_convolution(name: str, conv: Any) -> None:
    _check_geometry(name, conv, stride=(2, 2), groups=1)


def _check_depthwise(name: str, conv: Any) -> None:
    _check_geometry(name, conv, stride=(1, 1), groups=conv.in_channels)


def _check_geometry(name: str, conv: Any, stride: tuple[int, int], groups: int) -> None:
    _expect(name, conv, nn.Conv2d)
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    expected = ((3, 3), stride, (1, 1), (1, 1), groups, "zeros")
    if geometry != expected or conv.bias is None:
        raise OptimizeError(
            f"{name} has (kernel, stride, padding, dilation, groups, padding mode) {geometry} and "
            f"{'no ' if conv.bias is None else ''}bias, expected {expected} and bias; {_CURE}"
        )
