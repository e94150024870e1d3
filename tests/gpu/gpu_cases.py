"""Inputs for the operators on a GPU, and their comparison with the torch backend in float64 on the same device."""

from __future__ import annotations

import torch

from ssmamba_models import ops
from ssmamba_models.ops import dispatch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DEVICE = "cuda"


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def directional(height, width, channels=24, states=1, batch=2, dtype=torch.float32, hold=False):
    shape = (batch, height, width)
    return {
        "u": normal(*shape, channels, dtype=dtype),
        "delta": normal(*shape, channels, dtype=dtype),
        "A": -torch.rand(4, channels, states, device=DEVICE) * 2 - 0.1,
        "B": normal(*shape, 4, states, dtype=dtype),
        "C": normal(*shape, 4, states, dtype=dtype),
        "D": normal(channels),
        "delta_bias": normal(4, channels),
        "hold": torch.rand(shape, device=DEVICE) < 0.4 if hold else None,
    }


def selective(length, channels=24, states=2, groups=2, batch=2, dtype=torch.float32, gate=True, return_last_state=True):
    long = (batch, channels, length)
    return {
        "u": normal(*long, dtype=dtype),
        "delta": normal(*long, dtype=dtype),
        "A": -torch.rand(channels, states, device=DEVICE) * 2 - 0.1,
        "B": normal(batch, groups, states, length, dtype=dtype),
        "C": normal(batch, groups, states, length, dtype=dtype),
        "D": normal(channels),
        "z": normal(*long, dtype=dtype) if gate else None,
        "delta_bias": normal(channels),
        "delta_softplus": True,
        "return_last_state": return_last_state,
    }


def conv(length, channels=21, taps=4, batch=2, dtype=torch.float32):
    return {
        "x": normal(batch, channels, length, dtype=dtype),
        "weight": normal(channels, taps),
        "bias": normal(channels),
        "activation": "silu",
    }


FUNCTIONS = {
    "directional_scan": ops.directional_scan,
    "selective_scan": ops.selective_scan,
    "causal_conv1d": ops.causal_conv1d,
}
SMALL = {
    "directional_scan": lambda **kw: directional(9, 13, hold=True, **kw),
    "selective_scan": lambda **kw: selective(33, **kw),
    "causal_conv1d": lambda **kw: conv(300, **kw),
}


def leaves(inputs, dtype=None):
    return {
        name: x.detach().to(dtype or x.dtype).clone().requires_grad_()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def run(function, inputs, dtype=None):
    """Outputs and gradients by name; the loss weighs every output with fixed numbers."""
    given = leaves(inputs, dtype)
    result = outputs(function(**given))
    weights = [torch.sin(torch.arange(r.numel(), device=DEVICE, dtype=torch.float64)).view(r.shape) for r in result]
    torch.autograd.backward(result, [w.to(r.dtype) for w, r in zip(weights, result)])
    found = {f"output {i}": r.detach() for i, r in enumerate(result)}
    found.update({f"gradient of {k}": x.grad for k, x in given.items() if torch.is_tensor(x) and x.requires_grad})
    return found


def truth(op, inputs, monkeypatch):
    """The same in float64 by the torch backend, which the CPU tests hold against the definition."""
    forced = dispatch.forced()
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    found = run(FUNCTIONS[op], inputs, torch.float64)
    monkeypatch.setenv(dispatch.VARIABLE, forced or "")
    return found


def expect_close(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, x in got.items():
        error = (x.double() - want[name].double()).norm() / want[name].double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.1e}, allowed {tolerance:.0e}"
