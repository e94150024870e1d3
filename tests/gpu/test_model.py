"""The encoder end to end on a device against the same encoder on the CPU."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import ssmamba_models  # noqa: F401  (registers the models)

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture
def model():
    return timm.create_model("test_ssmamba", num_classes=5)


def on_cpu(model, images, monkeypatch):
    monkeypatch.delenv("SSMAMBA_BACKEND")
    out = model(images)
    monkeypatch.setenv("SSMAMBA_BACKEND", "triton")
    return out


@pytest.mark.parametrize("size", [(64, 64), (96, 65)])
def test_logits_agree(model, size, monkeypatch):
    images = torch.randn(2, 3, *size)
    model.eval()
    with torch.no_grad():
        want = on_cpu(model, images, monkeypatch)
        got = model.cuda()(images.cuda()).cpu()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_gradients_agree(model, monkeypatch):
    images, twin = torch.randn(2, 3, 64, 64), copy.deepcopy(model).cuda()
    monkeypatch.delenv("SSMAMBA_BACKEND")
    model(images).square().sum().backward()
    monkeypatch.setenv("SSMAMBA_BACKEND", "triton")
    twin(images.cuda()).square().sum().backward()
    for (name, want), got in zip(model.named_parameters(), twin.parameters()):
        error = (got.grad.cpu() - want.grad).norm() / want.grad.norm().clamp_min(1e-6)
        assert error < 1e-2, f"{name}: relative error {error:.1e}"


def test_autocast_stays_near_float32(model):
    model.cuda().eval()
    images = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.no_grad():
        want = model(images)
        with torch.autocast("cuda", torch.bfloat16):
            got = model(images)
    assert (got.float() - want).norm() <= 0.05 * want.norm() + 1e-2


def test_compiled_model_is_one_graph(model):
    model.cuda().eval()
    images = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=1e-3, atol=1e-3)


def test_checkpointed_training_step(model):
    model.cuda().train()
    model.set_grad_checkpointing(True)
    loss = model(torch.randn(2, 3, 64, 64, device="cuda")).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
