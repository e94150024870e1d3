"""Mamba: against a slow float64 loop with every gradient, its initial values, padding, and bad arguments."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmamba_models.engine.optimisation import parameter_groups
from ssmamba_models.layers import Mamba

pytestmark = pytest.mark.usefixtures("one_thread")


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Parameters away from their initial values, so that none of them is 0 or 1 by accident."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() > 1 else 1.0))
    return module


def slow_mamba(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One sequence x (L, C), step by step, from the paper; p the parameters by name, all of it float64."""
    inner, states = p["A_log"].shape
    rank = p["dt_proj.weight"].shape[1]
    projected = x @ p["in_proj.weight"].T
    u, z = projected[:, :inner], projected[:, inner:]
    taps = p["conv1d.weight"].shape[2]
    state = torch.zeros(inner, states, dtype=x.dtype)
    y = []
    for t in range(len(x)):
        convolved = p["conv1d.bias"]
        for j in range(taps):
            past = t - (taps - 1) + j
            if past >= 0:
                convolved = convolved + p["conv1d.weight"][:, 0, j] * u[past]
        v = convolved * torch.sigmoid(convolved)
        r, b, c = (p["x_proj.weight"] @ v).split((rank, states, states))
        dt = F.softplus(p["dt_proj.weight"] @ r + p["dt_proj.bias"])
        decay = torch.exp(-dt[:, None] * torch.exp(p["A_log"]))
        state = decay * state + dt[:, None] * b * v[:, None]
        gate = z[t] * torch.sigmoid(z[t])
        y.append(p["out_proj.weight"] @ ((state @ c + p["D"] * v) * gate))
    return torch.stack(y)


def slow_batch(module: Mamba, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loop over a batch in float64, and its leaves by name ("x" for the input)."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    leaves["x"] = x.detach().double().requires_grad_()
    return torch.stack([slow_mamba(leaves, row) for row in leaves["x"]]), leaves


def assert_close(found: torch.Tensor, want: torch.Tensor, name: str, tolerance: float = 2e-5) -> None:
    assert found.shape == want.shape, name
    assert (found.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-3), name


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    dim=st.integers(1, 20),
    d_state=st.sampled_from([1, 2, 5, 16]),
    d_conv=st.integers(2, 4),
    expand=st.integers(1, 3),
)
def test_values_and_every_gradient_are_those_of_the_loop(batch, length, dim, d_state, d_conv, expand):
    torch.manual_seed(0)
    module = randomise(Mamba(dim, d_state, d_conv, expand))
    x = torch.randn(batch, length, dim, requires_grad=True)
    upstream = torch.randn(batch, length, dim)
    y = module(x)
    (y * upstream).sum().backward()
    want, leaves = slow_batch(module, x)
    (want * upstream).sum().backward()
    assert_close(y.detach(), want.detach(), "y")
    found = {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    assert found.keys() == leaves.keys()
    largest = max(leaf.grad.abs().max() for leaf in leaves.values())
    for name, leaf in leaves.items():
        # A gradient that is almost 0 is a sum that cancels: it has the rounding of its terms.
        scale = leaf.grad.abs().max().clamp(min=max(0.01 * float(largest), 1e-3))
        assert (found[name].double() - leaf.grad).abs().max() <= 2e-5 * scale, name


def test_float64_is_computed_in_float64():
    torch.manual_seed(0)
    module = randomise(Mamba(6, 4)).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    want, _ = slow_batch(module, x)
    assert_close(module(x).detach(), want.detach(), "y", 1e-12)


def test_bfloat16_weights_and_autocast():
    torch.manual_seed(0)
    module, x = Mamba(16), torch.randn(2, 30, 16)
    want = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.float().sum().backward()
    assert_close(y.detach().float(), want.detach().double(), "autocast", 5e-2)
    rounded = Mamba(16, dtype=torch.bfloat16)
    rounded.load_state_dict(module.state_dict())
    y = rounded(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close(y.detach().float(), want.detach().double(), "bfloat16", 5e-2)


def test_it_sees_the_past_alone():
    torch.manual_seed(0)
    module, x = randomise(Mamba(5)), torch.randn(1, 12, 5)
    other = x.clone()
    other[:, 7] += 1
    with torch.no_grad():
        before, after = module(x), module(other)
    assert torch.equal(before[:, :7], after[:, :7])
    assert ((before - after)[:, 7:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize(("first", "last"), [(0, 4), (3, 0), (2, 5)])
def test_padding_changes_nothing(first, last):
    torch.manual_seed(0)
    module = randomise(Mamba(6, 3))
    x = torch.randn(2, 11, 6)
    padded = torch.cat((torch.full((2, first, 6), 7.0), x, torch.full((2, last, 6), -9.0)), 1).requires_grad_()
    mask = torch.zeros(2, padded.shape[1], dtype=torch.bool)
    mask[:, first : first + 11] = True
    alone = x.clone().requires_grad_()
    want, y = module(alone), module(padded, mask)
    torch.testing.assert_close(y[:, first : first + 11], want, rtol=1e-5, atol=1e-5)
    assert not y[~mask].any()
    want.square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(padded.grad[:, first : first + 11], alone.grad, rtol=1e-4, atol=1e-4)
    assert not padded.grad[~mask].any()


def test_initial_values():
    torch.manual_seed(0)
    module = Mamba(256, 8)
    dt = F.softplus(module.dt_proj.bias.detach().double())
    assert dt.min() >= 1e-3 * (1 - 1e-3)
    assert dt.max() <= 0.1 * (1 + 1e-3)
    # Log-uniform: the mean of the logarithm lies in the middle, its spread is that of a uniform distribution.
    assert dt.log().mean() == pytest.approx((math.log(1e-3) + math.log(0.1)) / 2, abs=0.15)
    assert dt.log().std() == pytest.approx((math.log(0.1) - math.log(1e-3)) / math.sqrt(12), abs=0.1)
    torch.testing.assert_close(module.A_log.detach().exp(), torch.arange(1.0, 9.0).expand(512, 8))
    assert (module.D == 1).all()
    assert module.dt_proj.weight.shape == (512, 16)
    assert module.dt_proj.weight.abs().max() <= 0.25


def test_weight_decay_leaves_the_state_space_alone():
    module = Mamba(8)
    with_decay, without = sorted(parameter_groups(module, 0.1), key=lambda group: -group["weight_decay"])
    names = {id(p): name for name, p in module.named_parameters()}
    assert {names[id(p)] for p in without["params"]} == {"A_log", "D", "dt_proj.bias", "conv1d.bias"}
    assert len(with_decay["params"]) == len(names) - 4


def test_the_meta_device():
    module = Mamba(8, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert module(torch.empty(2, 5, 8, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"d_state": 0}, "d_state is 0"),
        ({"expand": 1.5}, "expand is 1.5"),
        ({"dt_rank": -1}, "dt_rank is -1"),
        ({"d_conv": 5}, "d_conv is 5, expected 2, 3 or 4"),
    ],
)
def test_sizes_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        Mamba(**({"dim": 8} | arguments))


@pytest.mark.parametrize(
    ("x", "mask", "error", "words"),
    [
        (torch.ones(2, 4, 7), None, ValueError, r"expected \(B, L, 8\)"),
        (torch.ones(4, 8), None, ValueError, r"expected \(B, L, 8\)"),
        (torch.ones(2, 4, 8), torch.ones(2, 4), TypeError, "mask must be a bool tensor, not torch.float32"),
        (torch.ones(2, 4, 8), torch.ones(2, 5).bool(), ValueError, r"mask has shape \(2, 5\)"),
    ],
)
def test_inputs_that_do_not_fit(x, mask, error, words):
    with pytest.raises(error, match=words):
        Mamba(8)(x, mask)
