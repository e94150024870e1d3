"""AdamW and its schedule, as every training here uses them."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from ssmamba_models.engine.train_config import TrainConfig
from ssmamba_models.layers.dms import DirectionalSSM


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


def create_optimizer(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW over groups of parameters; a group's `lr_scale` (layer decay) is applied by the schedule."""
    return create_optimizer_v2(
        groups, opt="adamw", lr=config.peak_lr, weight_decay=config.weight_decay, betas=config.betas, fused=True
    )


def create_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> CosineLRScheduler:
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
