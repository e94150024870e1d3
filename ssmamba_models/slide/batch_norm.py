"""Batch normalisation over the rows of all processes, however many rows each has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmamba_models.layers.gather_rows import gather_rows


class RowBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` over (M, C) rows whose mean and variance are those of all processes, on any device.

    So training on several processes is that on one, and a single row, which torch refuses, is normalised to the bias.
    M may differ between processes. Parameters and buffers are those of `nn.BatchNorm1d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            count = rows.new_tensor([float(len(rows))])
            total = gather_rows(torch.cat((count, rows.sum(0)))[None]).sum(0)
            count, mean = total[0].detach(), total[1:] / total[0].detach()
            centred = rows - mean
            variance = gather_rows(centred.square().sum(0)[None]).sum(0) / count
            self._remember(mean, variance * count / (count - 1).clamp_min(1))
            return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
