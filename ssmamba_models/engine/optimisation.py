"""The optimiser and its schedule, as every training here uses them."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from ssmamba_models.models import DirectionalSSM

# Smaller sides leave orthogonalisation little to do: depthwise kernels (9), tables of a recurrence (4 directions).
_LEAST_SIDE = 16


class Recipe(Protocol):
    """What optimiser and schedule need to know of a training; `LoopConfig` says it, and `MilConfig`."""

    @property
    def epochs(self) -> int: ...

    @property
    def optimizer(self) -> str: ...

    @property
    def betas(self) -> tuple[float, float]: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def peak_lr(self) -> float: ...

    @property
    def min_lr(self) -> float: ...

    @property
    def warmup(self) -> float: ...


def undecayed_names(module: nn.Module) -> set[str]:
    """Full names of the parameters that a module, or any module inside it, wants without weight decay, and of those of
    every recurrence."""
    names = set()
    for prefix, inner in module.named_modules():
        if hasattr(inner, "no_weight_decay"):
            names |= {f"{prefix}.{name}" if prefix else name for name in inner.no_weight_decay()}
        # Decoders scan too, and are no timm models that could say so.
        if isinstance(inner, DirectionalSSM):
            names |= {f"{prefix}.{name}" for name, _ in inner.named_parameters(recurse=False)}
    return names


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that are trained: a group with weight decay, one without (norms, biases, `no_weight_decay`)."""
    return param_groups_weight_decay(module, weight_decay, no_weight_decay_list=undecayed_names(module))


def create_optimizer(config: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, Muon or SGD over groups of parameters; a group's `lr_scale` (layer decay) is applied by the schedule.

    Raises:
        ValueError: this timm has no Muon.
    """
    if config.optimizer == "muon":
        return _create_muon(config, groups)
    if config.optimizer == "sgd":
        # timm's "sgd" is Nesterov's.
        return create_optimizer_v2(
            groups, opt="momentum", lr=config.peak_lr, weight_decay=config.weight_decay, momentum=config.betas[0]
        )
    return create_optimizer_v2(
        groups, opt="adamw", lr=config.peak_lr, weight_decay=config.weight_decay, betas=config.betas, fused=True
    )


def _create_muon(config: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Source: Muon (K. Jordan, 2024), with AdamW's size of updates (arXiv:2502.16982, sec. 2.2)."""
    try:
        from timm.optim import muon
    except ImportError as error:
        raise ValueError(
            "optimizer 'muon' needs a newer timm than this one; pip install -U timm, or take optimizer=adamw"
        ) from error
    if not torch.cuda.is_available():
        _orthogonalize_in_float32(muon)
    split = [part for group in groups for part in _matrices_apart(group, config.weight_decay)]
    return muon.Muon(
        split,
        lr=config.peak_lr,
        weight_decay=config.weight_decay,
        momentum=0.95,
        nesterov=True,
        betas=config.betas,
        adjust_lr_fn="match_rms_adamw",
    )


def _matrices_apart(group: dict[str, Any], weight_decay: float) -> list[dict[str, Any]]:
    """A group in two: matrices that Muon can turn, and the rest.

    A recurrence's tables have two axes as well, but are no linear maps: they have few rows, or are not decayed.
    """
    undecayed = weight_decay > 0 and group.get("weight_decay") == 0
    parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for parameter in group["params"]:
        rows, columns = len(parameter) if parameter.ndim else 1, parameter[0].numel() if parameter.ndim else 1
        parts[undecayed or min(rows, columns) < _LEAST_SIDE].append(parameter)
    return [{**group, "params": params, "use_fallback": rest} for rest, params in parts.items() if params]


def _orthogonalize_in_float32(muon: Any) -> None:
    # timm iterates in bfloat16, which a CPU without such instructions emulates: a step took ten times as long.
    inner = muon.zeropower_via_newtonschulz
    if not isinstance(inner, functools.partial):
        muon.zeropower_via_newtonschulz = functools.partial(inner, dtype=torch.float32)


def create_schedule(config: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up, then a cosine, per update: call `step_update(updates done)` after each."""
    steps = steps_per_epoch * config.epochs
    warmup = min(round(config.warmup * steps_per_epoch), steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup,
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_lr_init=config.peak_lr / max(warmup, 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )
