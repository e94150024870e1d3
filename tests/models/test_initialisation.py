"""Initial values: `init_weights` after `to_empty` gives what building the model gives."""

from __future__ import annotations

import math

import pytest
import timm
import torch

ARGUMENTS = [
    {"num_classes": 5},
    {"num_classes": 0, "scan_init": "unit", "d_state": 2},
    {"num_classes": 5, "global_pool": "catavgmax", "dtype": torch.bfloat16},
]


def fresh(name: str = "test_ssmamba", seed: int = 0, **arguments) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **arguments)


def from_meta(name: str = "test_ssmamba", seed: int = 0, **arguments) -> torch.nn.Module:
    """Built without memory, given memory full of NaN, then initialised."""
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    torch.manual_seed(seed)
    model.init_weights()
    return model


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_a_model_from_meta_is_a_fresh_one(arguments):
    """The same seed gives the same tensors, all of them; another seed others."""
    want, found = fresh(**arguments).state_dict(), from_meta(**arguments).state_dict()
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name
    another, other = fresh(seed=1, **arguments).state_dict(), from_meta(seed=1, **arguments).state_dict()
    assert not torch.equal(another["stem.conv1.weight"], want["stem.conv1.weight"])
    assert all(torch.equal(other[name], tensor) for name, tensor in another.items())


def test_a_model_from_meta_has_a_fresh_ones_distribution():
    """Over other seeds, and of a model large enough for statistics: no parameter keeps another initialisation."""
    want = fresh("ssmamba_tiny", seed=1, num_classes=100).named_parameters()
    found = dict(from_meta("ssmamba_tiny", seed=2, num_classes=100).named_parameters())
    for name, parameter in want:
        a, b = parameter.detach().double(), found[name].detach().double()
        if a.std() == 0:
            assert torch.equal(a, b), name
        else:
            error = a.std() / math.sqrt(a.numel())
            assert abs(a.mean() - b.mean()) < 6 * math.sqrt(2) * error, name
            assert b.std() / a.std() == pytest.approx(1, abs=6 / math.sqrt(a.numel())), name


def test_initialising_again_moves_away_from_training():
    model = fresh(num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(3.0)
    torch.manual_seed(0)
    model.init_weights(needs_reset=True)
    want = fresh(num_classes=5).state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


def test_without_reset_layers_that_initialise_themselves_are_kept():
    model = fresh(num_classes=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.init_weights(needs_reset=False)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.endswith(("fc1.weight", "fc2.weight", "head.fc.weight")) for name in changed)


@pytest.mark.parametrize("kind", ["DirectionalSSM", "DMS", "LPR"])
def test_layers_reset_their_own_parameters(kind):
    block = fresh().stages[0].blocks[0]
    module = {"DirectionalSSM": block.dms.scans[0], "DMS": block.dms, "LPR": block.lpr}[kind]
    assert type(module).__name__ == kind
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    for inner in module.children():
        inner.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("reset", [False, True])
def test_mlps_and_classifier_start_at_a_standard_deviation_of_002(reset):
    model = fresh("ssmamba_tiny", num_classes=100)
    if reset:
        model.reset_classifier(200)
    for layer in (model.head.fc, model.stages[1].blocks[0].mlp.fc1, model.stages[1].blocks[0].mlp.fc2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
