"""Mamba and the aggregators on a GPU: what they give, and their gradients, are those of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from ssmamba_models.layers import Mamba
from ssmamba_models.slide.aggregators import create_aggregator, list_aggregators


def gradients(module, loss) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    largest = max(value.abs().max() for value in want.values())
    for name, value in want.items():
        scale = value.abs().max().clamp(min=0.01 * largest)
        assert (found[name] - value).abs().max() <= 2e-3 * scale, name


@pytest.mark.parametrize("backend", ["triton_backend", "cuda_backend"])
def test_mamba(backend, request):
    cpu = Mamba(24, 8)
    x, mask = torch.randn(2, 500, 24), torch.arange(500)[None] < torch.tensor([[500], [333]])
    want = gradients(cpu, cpu(x, mask).square().sum())
    request.getfixturevalue(backend)
    gpu = copy.deepcopy(cpu).cuda()
    gpu.zero_grad()
    assert_near(gradients(gpu, gpu(x.cuda(), mask.cuda()).square().sum()), want)


@pytest.mark.parametrize("name", list_aggregators())
def test_aggregators(name):
    if name not in ("mambamil", "mean", "max", "pama"):
        pytest.importorskip("torchmil", reason="this aggregator needs the [mil] extra")
    # Devices draw other anchors to drop.
    arguments = {"model": "test_pama", "model_args": {"anchor_drop_rate": 0.0}} if name == "pama" else {}
    cpu = create_aggregator(name, 16, 3, dropout=0.0, **arguments).train()
    features = torch.randn(1, 300, 16)
    coords = torch.stack((torch.arange(300) % 20, torch.arange(300) // 20), -1)[None] * 448
    output = cpu(features, coords)
    want = gradients(cpu, cpu.loss(output, torch.tensor([2])))
    gpu = copy.deepcopy(cpu).cuda()
    gpu.zero_grad()
    on_gpu = gpu(features.cuda(), coords.cuda())
    torch.testing.assert_close(on_gpu["logits"].cpu(), output["logits"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(on_gpu["attention"].cpu(), output["attention"], rtol=1e-2, atol=1e-5)
    assert_near(gradients(gpu, gpu.loss(on_gpu, torch.tensor([2]).cuda())), want)
