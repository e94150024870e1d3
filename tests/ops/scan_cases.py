"""Inputs for the three operators, the float64 truth about them, and how far a backend is from it."""

from __future__ import annotations

import functools

import torch

from ssmamba_models import ops
from ssmamba_models.ops import reference

BACKENDS = ("c", "torch", "reference")
# What a backend may be off, as a share of the largest value: rounding of the computation, or of the stored result.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

Inputs = dict[str, object]


def rounded(dtype: torch.dtype, *names: str, **tensors: torch.Tensor | None) -> Inputs:
    """The tensors in float32, those named in `dtype`: activations follow the model's dtype, parameters do not."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {k: None if x is None else x.to(dtype if k in names else wide) for k, x in tensors.items()}


def directional_inputs(
    height: int, width: int, channels: int = 19, states: int = 1, batch: int = 2, dtype: torch.dtype = torch.float32,
    skip: bool = True, bias: bool = True, hold: bool = False, seed: int = 0,
) -> Inputs:
    """Arguments of directional_scan, with step sizes on both sides of 1."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = rounded(
        dtype, "u", "delta", "B", "C",
        u=randn(batch, height, width, channels),
        delta=randn(batch, height, width, channels),
        A=-0.2 - torch.rand(4, channels, states, generator=g, dtype=torch.float64) * states,
        B=randn(batch, height, width, 4, states),
        C=randn(batch, height, width, 4, states),
        D=randn(channels) if skip else None,
        delta_bias=randn(4, channels) - 1 if bias else None,
    )
    inputs["hold"] = torch.rand(batch, height, width, generator=g) < 0.4 if hold else None
    return inputs


def selective_inputs(
    length: int, channels: int = 19, states: int = 1, batch: int = 2, dtype: torch.dtype = torch.float32,
    groups: int = 0, skip: bool = True, gate: bool = True, bias: bool = True, softplus: bool = True, seed: int = 0,
) -> Inputs:
    """Arguments of selective_scan; groups 0 gives B and C as (B, N, L)."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    projection = (batch, groups, states, length) if groups else (batch, states, length)
    delta = randn(batch, channels, length)
    offset = randn(channels)
    inputs = rounded(
        dtype, "u", "delta", "B", "C", "z",
        u=randn(batch, channels, length),
        # Without softplus only positive steps are meant, and the state decays only with them.
        delta=delta if softplus else delta.abs() + 0.05,
        A=-0.2 - torch.rand(channels, states, generator=g, dtype=torch.float64) * states,
        B=randn(*projection),
        C=randn(*projection),
        D=randn(channels) if skip else None,
        z=randn(batch, channels, length) if gate else None,
        delta_bias=(offset if softplus else offset.abs()) if bias else None,
    )
    return inputs | {"delta_softplus": softplus}


def conv_inputs(
    length: int, channels: int = 19, taps: int = 4, batch: int = 2, dtype: torch.dtype = torch.float32,
    bias: bool = True, silu: bool = True, seed: int = 0,
) -> Inputs:
    """Arguments of causal_conv1d."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = rounded(
        dtype, "x",
        x=randn(batch, channels, length), weight=randn(channels, taps), bias=randn(channels) if bias else None,
    )
    return inputs | {"activation": "silu" if silu else None}


MAKERS = {
    "directional_scan": directional_inputs,
    "selective_scan": selective_inputs,
    "causal_conv1d": conv_inputs,
}


def call_public(op: str, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Results of the public function, as a tuple; the scan's last state included."""
    if op == "selective_scan":
        return ops.selective_scan(**inputs, return_last_state=True)
    return (getattr(ops, op)(**inputs),)


def call_reference(op: str, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Results of the definition, as a tuple."""
    if op != "selective_scan":
        return (getattr(reference, op)(**inputs),)
    inputs = dict(inputs)
    for name in ("B", "C"):
        if inputs[name].dim() == 3:
            inputs[name] = inputs[name][:, None]
    return reference.selective_scan(**inputs)


def output_grads(outputs: tuple[torch.Tensor, ...], seed: int = 1) -> list[torch.Tensor]:
    """Fixed gradients of the outputs, rounded to their dtypes."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype) for y in outputs]


def results_and_gradients(call, op: str, inputs: Inputs, grads=None) -> dict[str, torch.Tensor]:
    """Outputs as "y" (and "state"), the gradient of every tensor by its name."""
    leaves = {
        k: x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in inputs.items()
    }
    outputs = call(op, leaves)
    # Without pixels the definition's state is a constant.
    pairs = [p for p in zip(outputs, output_grads(outputs) if grads is None else grads) if p[0].requires_grad]
    torch.autograd.backward(*zip(*pairs))
    found = dict(zip(("y", "state"), (y.detach() for y in outputs)))
    for name, x in leaves.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            found[name] = torch.zeros_like(x) if x.grad is None and not outputs[0].numel() else x.grad
    return found


def truth_of(op: str, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the definition in float64, for the very numbers that the operator is given."""
    dtype = next(iter(inputs.values())).dtype
    wide = {
        k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in inputs.items()
    }
    with torch.no_grad():
        outputs = call_reference(op, wide)
    # The state is float32 where activations are narrower, so its gradient is not rounded to theirs.
    narrow = [dtype, torch.promote_types(dtype, torch.float32)]
    grads = [g.double() for g in output_grads(tuple(y.to(d) for y, d in zip(outputs, narrow)))]
    return results_and_gradients(call_reference, op, wide, grads)


@functools.cache
def known_truth(op: str, arguments: tuple[tuple[str, object], ...]) -> dict[str, torch.Tensor]:
    """:func:`truth_of` the inputs that these keyword arguments make: one slow loop serves every backend."""
    return truth_of(op, MAKERS[op](**dict(arguments)))


def relative_errors(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference over the largest true value, by name."""
    assert found.keys() == truth.keys()
    errors = {}
    for name, want in truth.items():
        have = found[name]
        assert have is not None, f"{name} has no gradient"
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        if want.numel():
            difference = (have.double() - want).abs().max().item()
            errors[name] = difference / max(want.abs().max().item(), 1e-30) if difference else 0.0
    return errors


def at_odd_address(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of x one byte behind where its dtype may lie, as of a file that was read whole."""
    raw = bytearray(x.numel() * x.element_size() + 64)
    start = -torch.frombuffer(raw, dtype=torch.uint8).data_ptr() % 64 + 1
    odd = torch.frombuffer(raw, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape)
    assert odd.data_ptr() % 2
    return odd.copy_(x)


def assert_close_to_truth(op: str, inputs: Inputs, truth=None, tolerance: float | None = None, grads=None) -> None:
    """The public function's results and all gradients, against the float64 definition."""
    dtype = next(iter(inputs.values())).dtype
    errors = relative_errors(results_and_gradients(call_public, op, inputs, grads), truth or truth_of(op, inputs))
    bad = {k: e for k, e in errors.items() if not e <= (tolerance or TOLERANCE[dtype])}
    assert not bad, f"{op}: relative errors {bad}"
