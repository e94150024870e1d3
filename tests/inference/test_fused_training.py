"""Blocks that train on fused operators: the loss and every gradient of the layers one by one."""

import copy
import io

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssmamba_models.inference import fuse_for_training, unfuse
from ssmamba_models.inference.fused_training import FusedBlock
from ssmamba_models.models.ssmamba import Block


@pytest.fixture
def operators(monkeypatch):
    """Counts how many blocks took the fused operators."""
    from ssmamba_models.inference import fused_training

    calls, branch = [], fused_training.ScanBranch.apply
    monkeypatch.setattr(fused_training.ScanBranch, "apply", lambda *a: (calls.append(1), branch(*a))[1])
    return calls


def step(module, *inputs, seed=1, autocast=False):
    """Loss and gradients of one pass."""
    torch.manual_seed(seed)
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = module(*inputs).float().square().mean()
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def assert_same_step(module, *inputs, tolerance=1e-4, **kwargs):
    fused = copy.deepcopy(module)
    assert fuse_for_training(fused) > 0
    loss, grads = step(module, *inputs, **kwargs)
    fused_loss, fused_grads = step(fused, *inputs, **kwargs)
    assert fused_loss == pytest.approx(loss, rel=tolerance)
    for name, grad in grads.items():
        scale = grad.norm().clamp_min(1e-6)
        assert (fused_grads[name] - grad).norm() / scale < tolerance, name
    return fused


def build(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_ssmamba", num_classes=5, **kwargs).train()


@pytest.mark.parametrize(
    ("kwargs", "size", "batch"),
    [
        ({}, (96, 96), 2),
        ({"drop_path_rate": 0.5}, (96, 64), 5),
        ({"drop_path_rate": 0.95}, (64, 64), 2),  # a branch without images
        ({"d_state": 3, "drop_path_rate": 0.2}, (75, 41), 3),
        ({"dims": (5, 12, 17, 23), "scales": ((1, 2, 3), (2,), (1,), (1, 2))}, (96, 96), 2),
        ({"proj_drop_rate": 0.2, "drop_path_rate": 0.2}, (64, 64), 4),
        ({}, (32, 32), 1),  # maps of one token
    ],
)
def test_a_step_is_that_of_the_layers(kwargs, size, batch, operators):
    model = build(**kwargs)
    assert_same_step(model, torch.randn(batch, 3, *size))
    assert len(operators) == sum(len(stage.blocks) for stage in model.stages)


def test_under_autocast(operators):
    model, images = build(drop_path_rate=0.3), torch.randn(4, 3, 96, 96)
    fused = copy.deepcopy(model)
    fuse_for_training(fused)
    _, exact = step(model, images)
    _, by_layers = step(model, images, autocast=True)
    _, by_operators = step(fused, images, autocast=True)
    assert operators

    def error(grads):
        flat = [torch.cat([g[name].flatten() for name in exact]) for g in (grads, exact)]
        return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()

    assert error(by_operators) < max(1e-2, 1.1 * error(by_layers))


@pytest.mark.parametrize("scales", [(1,), (1, 2), (3,)])
def test_hold_masks(scales, operators):
    torch.manual_seed(0)
    block = Block(20, scales, drop_path=0.4).train()
    hold = torch.rand(4, 7, 9) < 0.5
    assert_same_step(block, torch.randn(4, 7, 9, 20), hold)
    assert operators


def test_the_inputs_gradient_and_strides(operators):
    torch.manual_seed(0)
    block = Block(20, (1, 2)).train()
    x = torch.randn(2, 20, 6, 7).permute(0, 2, 3, 1).requires_grad_()
    block(x).square().sum().backward()
    wanted, x.grad = x.grad, None
    fuse_for_training(block)
    block(x).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted, atol=1e-4, rtol=1e-4)
    assert operators


def test_grad_checkpointing(operators):
    model = build(drop_path_rate=0.3)
    model.set_grad_checkpointing()
    assert_same_step(model, torch.randn(3, 3, 64, 64))
    assert operators


def test_without_gradients_and_in_eval_mode(operators):
    model = build(drop_path_rate=0.3).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(images)
        fuse_for_training(model)
        torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=1e-5)
    assert operators


def test_frozen_parameters_get_no_gradient():
    block = Block(12, (1,)).train()
    block.mlp.fc1.weight.requires_grad_(False)
    fuse_for_training(block)
    block(torch.randn(1, 4, 4, 12)).sum().backward()
    assert block.mlp.fc1.weight.grad is None
    assert block.mlp.fc2.weight.grad is not None


def test_equal_seeds_give_equal_steps():
    model = build(drop_path_rate=0.5)
    fuse_for_training(model)
    images = torch.randn(4, 3, 64, 64)
    (first, grads), (second, again) = step(model, images), step(model, images)
    assert first == second
    assert all(torch.equal(grads[name], again[name]) for name in grads)


def test_what_stands_around_a_block_stays():
    model = build()
    keys = list(model.state_dict())
    assert fuse_for_training(model) == 5
    assert fuse_for_training(model) == 0
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        blocks = [module for module in other.modules() if isinstance(module, Block)]
        assert all(type(block) is FusedBlock for block in blocks)
        assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in model.parameters())
        assert unfuse(other) == 5
        assert not any(isinstance(module, FusedBlock) for module in other.modules())


class _Adapter(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear, self.gain = linear, nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.gain * self.linear(x)


def _replace(block):
    block.mlp.fc1 = _Adapter(block.mlp.fc1)


def _parametrize(block):
    nn.utils.parametrizations.weight_norm(block.dms.in_proj)


def _hook(block):
    block.dms.scans[0].register_forward_hook(lambda module, args, y: 2 * y)


def _hook_backward(block):
    block.norm2.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],))


def _set_forward(block):
    block.dms.act.forward = torch.relu


def _add_biases(block):
    for scan in block.dms.scans:
        for name in ("x_proj", "dt_proj"):
            layer = getattr(scan, name)
            layer.bias = nn.Parameter(torch.full((layer.out_features,), 0.5))


def _change_geometry(block):
    block.lpr.conv.padding_mode = "circular"


def _change_gelu(block):
    block.mlp.act = nn.GELU(approximate="tanh")


@pytest.mark.parametrize(
    "change", [_replace, _parametrize, _hook, _hook_backward, _set_forward, _change_geometry, _add_biases, _change_gelu]
)
def test_what_the_operators_cannot_stand_for_is_computed_by_layers(change, operators):
    """Changed after the blocks were fused, too."""
    torch.manual_seed(0)
    block, x = Block(12, (1, 2)).train(), torch.randn(2, 6, 6, 12)
    fused = copy.deepcopy(block)
    fuse_for_training(fused)
    step(fused, x)
    assert len(operators) == 1
    for each in (block, fused):
        change(each)
    loss, grads = step(block, x)
    fused_loss, fused_grads = step(fused, x)
    assert len(operators) == 1
    assert loss == fused_loss
    assert all(torch.equal(grads[name], fused_grads[name]) for name in grads)


def test_other_backends_compute_by_layers(operators, monkeypatch):
    monkeypatch.setenv("SSMAMBA_BACKEND", "torch")
    block = Block(12, (1, 2)).train()
    assert_same_step(block, torch.randn(2, 6, 6, 12))
    assert not operators


def test_double_precision_and_transforms_compute_by_layers(operators):
    block = Block(12, (1, 2)).train()
    fuse_for_training(block)
    x = torch.randn(1, 4, 4, 12)
    _, tangent = torch.func.jvp(block, (x,), (x,))
    assert tangent.abs().sum() > 0
    block.double()(x.double()).sum().backward()
    assert not operators


def test_a_mask_that_does_not_fit_is_refused():
    block = Block(12, (2,)).train()
    fuse_for_training(block)
    with pytest.raises(ValueError, match="hold has shape"):
        block(torch.randn(1, 4, 4, 12), torch.zeros(1, 3, 4, dtype=torch.bool))


def test_classes_derived_from_block_are_left_alone():
    class Derived(Block):
        pass

    assert fuse_for_training(nn.ModuleList([Derived(12, (1,)), Block(12, (1,))])) == 1


def test_reentrant_use_of_one_block(operators):
    """Twice in one graph: what is saved of one call is not that of the other."""
    torch.manual_seed(0)
    block = Block(12, (1, 2), drop_path=0.3).train()
    twice = nn.Sequential(block, block)
    assert_same_step(twice, torch.randn(4, 5, 5, 12))
    checkpoint(block, torch.randn(1, 4, 4, 12), use_reentrant=False).sum().backward()
    assert operators
