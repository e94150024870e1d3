"""Every backend against the definition in float64: results and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scan_cases import (
    MAKERS,
    TOLERANCE,
    assert_close_to_truth,
    call_public,
    call_reference,
    known_truth,
    relative_errors,
    results_and_gradients,
    truth_of,
)

HALF = (torch.bfloat16, torch.float16)


def check(op: str, **arguments) -> None:
    assert_close_to_truth(op, MAKERS[op](**arguments), known_truth(op, tuple(sorted(arguments.items(), key=str))))


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 2), (2, 1), (3, 1), (1, 31), (31, 1), (4, 8), (3, 11), (11, 3), (7, 28), (14, 14)],
)
def test_directional_scan_at_every_shape(backend, height, width):
    check("directional_scan", height=height, width=width, channels=19)


@pytest.mark.parametrize(("height", "width", "hold"), [(49, 64, False), (112, 28, True)])
def test_directional_scan_of_a_long_map(fast_backend, height, width, hold):
    # 3136 pixels: several chunks of the backward pass in every direction.
    check("directional_scan", height=height, width=width, channels=17, batch=1, hold=hold)


@pytest.mark.parametrize("states", [2, 8, 16])
@pytest.mark.parametrize("channels", [1, 16, 33])
@pytest.mark.parametrize("hold", [False, True])
def test_directional_scan_with_more_states(backend, states, channels, hold):
    check("directional_scan", height=5, width=3, channels=channels, states=states, hold=hold)


@pytest.mark.parametrize("states", [8, 16])
def test_directional_scan_with_states_in_chunks(fast_backend, states):
    # With 16 states a chunk of the C backward pass is 45 steps: 196 are four full chunks and a rest.
    check("directional_scan", height=28, width=7, channels=18, states=states, batch=1, hold=True)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_directional_scan_without_optional_arguments(backend, skip, bias, hold):
    check("directional_scan", height=4, width=3, channels=5, skip=skip, bias=bias, hold=hold)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("height", "width", "states"), [(1, 1, 1), (3, 11, 2), (14, 14, 1), (6, 5, 16)])
def test_directional_scan_in_half_precision(backend, dtype, height, width, states):
    check("directional_scan", height=height, width=width, channels=35, states=states, hold=True, dtype=dtype)


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 196])
@pytest.mark.parametrize("states", [1, 16])
def test_selective_scan_at_every_length(backend, length, states):
    check("selective_scan", length=length, states=states)


@pytest.mark.parametrize("states", [1, 8])
def test_selective_scan_of_a_long_sequence(fast_backend, states):
    check("selective_scan", length=3136, channels=17, states=states, batch=1)


@pytest.mark.parametrize("states", [2, 8])
@pytest.mark.parametrize(("channels", "groups"), [(6, 0), (6, 1), (6, 3), (34, 2), (5, 5)])
def test_selective_scan_with_groups(backend, channels, groups, states):
    check("selective_scan", length=9, channels=channels, groups=groups, states=states)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_selective_scan_without_optional_arguments(backend, softplus, gate, bias, skip):
    check("selective_scan", length=6, channels=5, states=2, softplus=softplus, gate=gate, bias=bias, skip=skip)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("length", "states"), [(1, 1), (33, 16), (196, 1)])
def test_selective_scan_in_half_precision(backend, dtype, length, states):
    check("selective_scan", length=length, channels=35, states=states, dtype=dtype)


@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")])
def test_selective_scan_with_constant_projections(backend, constant):
    """B and C may be (D, N), the same at all times: a recurrence per channel, as in S4."""
    inputs = MAKERS["selective_scan"](length=7, channels=6, states=3)
    for name in constant:
        inputs[name] = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))

    def definition(op, arguments):
        full = {
            name: arguments[name][None, :, :, None].expand(2, 6, 3, 7) if name in constant else
            arguments[name][:, None].expand(2, 6, 3, 7)
            for name in ("B", "C")
        }
        return call_reference(op, arguments | full)

    if len(constant) == 1:  # groups of B and of C must agree: one each, or one per channel
        other = "C" if constant == ("B",) else "B"
        inputs[other] = inputs[other][:, None].expand(2, 6, 3, 7).contiguous()
        definition_other = inputs[other]
        assert definition_other.shape == (2, 6, 3, 7)

        def definition(op, arguments):
            name = constant[0]
            return call_reference(op, arguments | {name: arguments[name][None, :, :, None].expand(2, 6, 3, 7)})

    wide = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    narrow = results_and_gradients(call_public, "selective_scan", inputs)
    errors = relative_errors(narrow, results_and_gradients(definition, "selective_scan", wide, _float32_grads(inputs)))
    assert max(errors.values()) <= TOLERANCE[torch.float32], errors


def _float32_grads(inputs):
    from scan_cases import output_grads

    outputs = call_public("selective_scan", inputs)
    return [g.double() for g in output_grads(outputs)]


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 196, 3136])
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_causal_conv1d_at_every_length(backend, length, taps):
    check("causal_conv1d", length=length, taps=taps)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels", [1, 16])
def test_causal_conv1d_without_optional_arguments(backend, bias, silu, channels):
    check("causal_conv1d", length=17, channels=channels, bias=bias, silu=silu)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 33, 196])
def test_causal_conv1d_in_half_precision(backend, dtype, taps, length):
    check("causal_conv1d", length=length, taps=taps, dtype=dtype)


@pytest.mark.parametrize("op", list(MAKERS))
@pytest.mark.parametrize("name", ["torch", "reference", ""])
def test_float64_is_computed_in_float64(op, name, monkeypatch):
    monkeypatch.setenv("SSMAMBA_BACKEND", name)  # "": the C kernels leave float64 to torch
    shape = {"height": 5, "width": 7} if op == "directional_scan" else {"length": 35}
    check(op, **shape, channels=5, dtype=torch.float64)


@pytest.mark.parametrize("op", list(MAKERS))
def test_swish_and_unused_state_change_nothing(op, backend):
    """The other spelling of an option gives the same result; a state that nobody asks for costs no gradient."""
    shape = {"height": 5, "width": 2} if op == "directional_scan" else {"length": 10}
    inputs = MAKERS[op](**shape)
    if op == "causal_conv1d":
        assert torch.equal(*(call_public(op, inputs | {"activation": name})[0] for name in ("silu", "swish")))
        return
    leaves = {k: x.detach().requires_grad_() if k == "A" else x for k, x in inputs.items()}
    call_public(op, leaves)[0].sum().backward()
    truth = call_reference_gradient(op, inputs)
    assert (leaves["A"].grad.double() - truth).abs().max() <= 1e-5 * truth.abs().max()


def call_reference_gradient(op, inputs) -> torch.Tensor:
    wide = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
    wide["A"] = wide["A"].requires_grad_()
    return torch.autograd.grad(call_reference(op, wide)[0].sum(), wide["A"])[0]


def test_a_gradient_of_the_last_state_alone(backend):
    """The state may be all that is used, as when a sequence is read in pieces."""
    inputs = MAKERS["selective_scan"](length=12, states=3)
    leaves, wide = {}, {}
    for k, x in inputs.items():
        tensor = isinstance(x, torch.Tensor)
        leaves[k] = x.detach().requires_grad_() if tensor else x
        wide[k] = x.detach().double().requires_grad_() if tensor else x
    call_public("selective_scan", leaves)[1].square().sum().backward()
    call_reference("selective_scan", wide)[1].square().sum().backward()
    for name in ("u", "delta", "A", "B", "delta_bias"):
        want = wide[name].grad
        assert (leaves[name].grad.double() - want).abs().max() <= 1e-5 * want.abs().max(), name
    for name in ("C", "D", "z"):  # the state does not depend on them
        assert not leaves[name].grad.any(), name


# ---- shapes that nobody thought of ----

_quietly = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@_quietly
@given(
    height=st.integers(1, 7), width=st.integers(1, 7), channels=st.integers(1, 40), states=st.integers(1, 18),
    batch=st.integers(1, 3), skip=st.booleans(), bias=st.booleans(), hold=st.booleans(), dtype=_dtypes,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_directional_scan_of_any_shape(fast_backend, **arguments):
    assert_close_to_truth("directional_scan", MAKERS["directional_scan"](**arguments))


@_quietly
@given(
    length=st.integers(1, 60), per_group=st.integers(1, 20), groups=st.integers(0, 3), states=st.integers(1, 18),
    batch=st.integers(1, 3), skip=st.booleans(), gate=st.booleans(), bias=st.booleans(), softplus=st.booleans(),
    dtype=_dtypes, seed=st.integers(0, 99),
)  # fmt: skip
def test_selective_scan_of_any_shape(fast_backend, per_group, groups, **arguments):
    inputs = MAKERS["selective_scan"](channels=per_group * max(groups, 1), groups=groups, **arguments)
    assert_close_to_truth("selective_scan", inputs)


@_quietly
@given(
    length=st.integers(1, 70), channels=st.integers(1, 40), taps=st.integers(2, 4), batch=st.integers(1, 3),
    bias=st.booleans(), silu=st.booleans(), dtype=_dtypes, seed=st.integers(0, 99),
)  # fmt: skip
def test_causal_conv1d_of_any_shape(fast_backend, **arguments):
    assert_close_to_truth("causal_conv1d", MAKERS["causal_conv1d"](**arguments))


# ---- gradcheck: the definition's own derivatives, and the torch backend's hand-written ones ----


@pytest.mark.parametrize("op", list(MAKERS))
@pytest.mark.parametrize("by", ["definition", "torch backend"])
def test_gradcheck(op, by, monkeypatch):
    monkeypatch.setenv("SSMAMBA_BACKEND", "torch")
    shape = {"height": 2, "width": 3, "hold": True} if op == "directional_scan" else {"length": 5}
    if op != "causal_conv1d":
        shape["states"] = 2
    inputs = MAKERS[op](**shape, channels=2, batch=1, dtype=torch.float64)
    names = [k for k, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    call = call_reference if by == "definition" else call_public

    def function(*tensors):
        return call(op, inputs | dict(zip(names, tensors)))

    assert torch.autograd.gradcheck(function, [inputs[k].requires_grad_() for k in names])


# ---- awkward values ----


def test_large_steps_of_either_sign(backend):
    """A step of 1e6 forgets everything before it, one of -1e6 (softplus: 0) changes nothing; nothing overflows."""
    inputs = MAKERS["directional_scan"](height=3, width=5, channels=18, states=2)
    for i, value in enumerate((1e2, -1e2, 1e4, -1e4, 1e6, -1e6, 30.0, -30.0)):
        inputs["delta"][:, i % 3, i % 5] = value
    assert_close_to_truth("directional_scan", inputs)


# A step beyond 1e15 / |A| would overflow a polynomial in the C kernel: none that a softplus makes comes near it.
@pytest.mark.parametrize("step", [1e2, 1e4, 1e6, 1.2e6, 1e7, 1e9, 1e12])
@pytest.mark.parametrize("A", [-0.5, -10.0])
def test_a_large_step_forgets_the_state(backend, step, A):
    inputs = MAKERS["selective_scan"](length=4, channels=3, gate=False)
    inputs["A"] = torch.full_like(inputs["A"], A)
    inputs["delta"][:, :, 1] = step
    assert_close_to_truth("selective_scan", inputs)


def test_a_step_of_minus_infinity_changes_nothing(backend):
    """softplus(-inf) is 0: the usual way to mask a token where there is no mask argument."""
    inputs = MAKERS["selective_scan"](length=6, channels=18, states=2, gate=False, skip=False)
    inputs["delta"][:, :, 2:4] = -torch.inf
    y, state = call_public("selective_scan", inputs)
    want, want_state = call_reference("selective_scan", inputs)
    assert want.isfinite().all()
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, want_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["directional_scan", "selective_scan"])
def test_a_growing_state(op, backend):
    """A > 0 is allowed: the state grows, and the result is that of the definition."""
    shape = {"height": 3, "width": 4} if op == "directional_scan" else {"length": 12}
    inputs = MAKERS[op](**shape, states=2)
    inputs["A"] = -0.5 * inputs["A"]
    assert_close_to_truth(op, inputs)


@pytest.mark.parametrize("name", ["u", "delta", "B", "C"])
@pytest.mark.parametrize("op", ["directional_scan", "selective_scan"])
def test_nan_in_gives_nan_out(op, name, backend):
    """A NaN is passed on, to the same pixels as by the definition: never clamped into a number."""
    shape = {"height": 3, "width": 4} if op == "directional_scan" else {"length": 12, "gate": False}
    inputs = MAKERS[op](**shape, states=2)
    pixel = (0, 1, 2) if op == "directional_scan" else (0, slice(None), 5)
    inputs[name][pixel] = torch.nan
    y, want = call_public(op, inputs)[0], call_reference(op, inputs)[0]
    assert want.isnan().any()
    assert torch.equal(y.isnan(), want.isnan())


@pytest.mark.parametrize("op", ["directional_scan", "selective_scan"])
def test_nan_in_one_channel_of_A_stays_there(op, backend):
    shape = {"height": 2, "width": 4} if op == "directional_scan" else {"length": 8}
    inputs = MAKERS[op](**shape, channels=20, states=2)
    inputs["A"][..., 7, 1] = torch.nan
    y = call_public(op, inputs)[0]
    y = y if op == "directional_scan" else y.movedim(1, -1)
    # The very first state is 0, which NaN turns into NaN all the same.
    assert y[..., 7].isnan().all()
    assert y[..., [c for c in range(20) if c != 7]].isfinite().all()


@pytest.mark.parametrize("op", list(MAKERS))
@pytest.mark.parametrize("empty", ["batch", "length", "channels"])
def test_empty_inputs(op, empty, backend):
    """No images, no pixels or no channels: an empty result, zero gradients, a zero state."""
    sizes = {"batch": 2, "channels": 3, "length": 4} | {empty: 0}
    if op == "directional_scan":
        length = sizes.pop("length")
        sizes |= {"height": length, "width": 2}
    inputs = MAKERS[op](**sizes)
    found = results_and_gradients(call_public, op, inputs)
    truth = truth_of(op, inputs)
    for name, want in truth.items():
        assert found[name].shape == want.shape, name
        assert not found[name].any(), name
