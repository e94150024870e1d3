"""One training step, as the commands that train do it: the same for every method and every model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ssmamba_models.inference import fuse_for_training


class TrainStep:
    """Forward, backward and AdamW step of a module that returns its loss.

    Every training benchmark goes through here, so what the trainer of the commands (`engine.loop.Trainer`) does to a
    module before it trains it is done in `__init__`, and nowhere else.

    Args:
        module: called with a batch that is on `device`; returns a scalar.
        device: "cpu" or "cuda".
        dtype: "float32", or "bfloat16" for autocast over float32 weights.
        channels_last: lay convolution weights out as NHWC, as the trainer does.
    """

    def __init__(self, module: nn.Module, device: str = "cpu", dtype: str = "float32", channels_last: bool = True):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.module = module.to(device).to(memory_format=layout).train()
        if torch.device(device).type == "cpu":
            fuse_for_training(self.module)
        self.device, self.bf16 = torch.device(device), dtype == "bfloat16"
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.parameters_m = sum(parameter.numel() for parameter in trained) / 1e6
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def __call__(self, batch: Any) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.module(batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


class SupervisedLoss(nn.Module):
    """Cross-entropy of a classifier. forward: ((B, 3, H, W) images, (B,) classes) -> a scalar."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)
