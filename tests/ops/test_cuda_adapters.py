"""The mamba-ssm and causal-conv1d adapters on stand-ins, which record calls and compute with the definitions."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from scan_cases import MAKERS, at_odd_address, call_public, output_grads, results_and_gradients

from ssmamba_models import ops
from ssmamba_models.ops import cuda, dispatch, naive


class ScanStandIn:
    """`selective_scan_cuda`: the same interface, results by naive.py; it checks what the kernel would misread."""

    def __init__(self):
        self.calls = []

    def _check(self, u, delta, A, B, C, D, z, delta_bias):
        assert all(x is None or x.data_ptr() % x.element_size() == 0 for x in (u, delta, A, B, C, D, z, delta_bias))
        for x in (u, delta, B, C, *([] if z is None else [z])):
            assert x.stride(-1) == 1
            assert x.dtype == u.dtype
        for x in (A, D, delta_bias):
            assert x is None or (x.dtype == torch.float32 and x.is_contiguous())
        assert B.dim() == C.dim() == 4
        assert u.shape[1] % B.shape[1] == 0
        assert A.shape[1] <= 256

    def fwd(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        self.calls.append("fwd")
        self._check(u, delta, A, B, C, D, z, delta_bias)
        out, state = naive.selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
        chunks = u.new_full((*A.shape[:0], u.shape[0], *A.shape[:1], 2, 2 * A.shape[1]), float("nan")).float()
        chunks[:, :, -1, 1::2] = state
        if z is None:
            return [out, chunks]
        return [out, chunks, naive.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)[0]]

    def bwd(self, u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
        self.calls.append("bwd")
        self._check(u, delta, A, B, C, D, z, delta_bias)
        assert dout.stride(-1) == 1
        assert dout.data_ptr() % dout.element_size() == 0
        assert (out is None) == (z is None)
        assert dz is None
        assert recompute_out_z is False
        assert x.shape[:2] == u.shape[:2]
        grads = naive.selective_scan_backward(dout, None, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        du, ddelta, dA, dB, dC, dD, dz, dbias = grads
        # The extension returns undefined tensors, None in Python, for what was not given.
        dD, dbias = (None if given is None else g for given, g in ((D, dD), (delta_bias, dbias)))
        return [du, ddelta, dA, dB, dC, dD, dbias] + ([] if z is None else [dz])


class ConvStandIn(torch.autograd.Function):
    """`causal_conv1d_fn`, an autograd function like the real one."""

    calls: list[str] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x, weight, bias, silu):
        assert x.stride(2) == 1
        assert all(t is None or t.data_ptr() % t.element_size() == 0 for t in (x, weight, bias))
        ConvStandIn.calls.append("forward")
        ctx.save_for_backward(x, weight, bias)
        ctx.silu = silu
        return naive.causal_conv1d(x, weight, bias, silu)

    @staticmethod
    def backward(ctx, grad):
        ConvStandIn.calls.append("backward")
        grads = naive.causal_conv1d_backward(grad, *ctx.saved_tensors, ctx.silu)
        return (*(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)), None)


def conv_stand_in(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    assert activation in (None, "silu")
    return ConvStandIn.apply(x, weight, bias, activation == "silu")


@pytest.fixture
def scan(monkeypatch):
    """The adapters over stand-ins, forced, and let loose on CPU tensors."""
    torch.manual_seed(0)
    stand_in = ScanStandIn()
    ConvStandIn.calls = []
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", stand_in)
    monkeypatch.setitem(sys.modules, "causal_conv1d", SimpleNamespace(causal_conv1d_fn=conv_stand_in))
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", dispatch.Backend("cuda", "ssmamba_models.ops.cuda", ()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    forget()
    yield stand_in
    monkeypatch.undo()
    forget()


def forget():
    for cached in (cuda.scan_module, cuda.conv_function, dispatch._missing, dispatch._choose):
        cached.cache_clear()


def backwards(function, inputs, monkeypatch):
    """Outputs and gradients by the adapters, and by the definition."""
    results = []
    for backend in ("cuda", "reference"):
        monkeypatch.setenv(dispatch.VARIABLE, backend)
        leaves = [x.clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
        out = function(*leaves)
        first, *rest = out if isinstance(out, tuple) else (out,)
        weights = torch.linspace(-1, 1, first.numel()).view(first.shape)
        loss = (first.float() * weights).sum() + sum((r * r).sum() for r in rest)
        loss.backward()
        results.append([first, *rest, *(x.grad for x in leaves if torch.is_tensor(x) and x.requires_grad)])
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    return results


def expect_equal(results, tolerance=1e-5):
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= tolerance * want.norm() + 1e-7


def sequence_inputs(gate=True, groups=2, optional=True):
    return (
        torch.randn(2, 6, 7),
        torch.randn(2, 6, 7),
        -torch.rand(6, 3),
        torch.randn(2, groups, 3, 7),
        torch.randn(2, groups, 3, 7),
        torch.randn(6) if optional else None,
        torch.randn(2, 6, 7) if gate else None,
        torch.randn(6) if optional else None,
        True,
    )


@pytest.mark.parametrize(("gate", "groups", "optional"), [(True, 2, True), (False, 1, False), (False, 3, True)])
def test_selective_scan(scan, monkeypatch, gate, groups, optional):
    expect_equal(backwards(ops.selective_scan, sequence_inputs(gate, groups, optional), monkeypatch))
    assert scan.calls == ["fwd", "fwd", "bwd"]  # the backward runs the forward again


def test_last_state_and_its_gradient(scan, monkeypatch):
    inputs = (*sequence_inputs(), True)
    expect_equal(backwards(ops.selective_scan, inputs, monkeypatch))
    assert scan.calls == ["fwd"], "the kernel has no gradient of the last state; torch's formulas have"


def test_strided_inputs_are_copied(scan, monkeypatch):
    u, *rest = sequence_inputs()
    expect_equal(backwards(ops.selective_scan, (u.transpose(1, 2).contiguous().transpose(1, 2), *rest), monkeypatch))


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("optional", [False, True])
def test_directional_scan_is_four_groups(scan, monkeypatch, hold, optional):
    inputs = (
        torch.randn(2, 3, 5, 4),
        torch.randn(2, 3, 5, 4),
        -torch.rand(4, 4, 2),
        torch.randn(2, 3, 5, 4, 2),
        torch.randn(2, 3, 5, 4, 2),
        torch.randn(4) if optional else None,
        torch.randn(4, 4) if optional else None,
        torch.rand(2, 3, 5) < 0.4 if hold else None,
    )
    expect_equal(backwards(ops.directional_scan, inputs, monkeypatch))
    assert scan.calls == ["fwd", "fwd", "bwd"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d(scan, monkeypatch, bias, activation):
    inputs = (torch.randn(2, 5, 9), torch.randn(5, 4), torch.randn(5) if bias else None, activation)
    expect_equal(backwards(ops.causal_conv1d, inputs, monkeypatch))
    assert ConvStandIn.calls == ["forward", "forward", "backward"]


def test_bfloat16_goes_through_as_it_is(scan):
    u, delta, A, B, C, D, z, bias, softplus = sequence_inputs()
    u, delta, B, C, z = (x.bfloat16() for x in (u, delta, B, C, z))
    assert ops.selective_scan(u, delta, A, B, C, D, z, bias, softplus).dtype == torch.bfloat16
    assert scan.calls == ["fwd"]


def test_limits_are_checked_before_the_call(scan):
    with pytest.raises(ValueError, match="float64"):
        ops.selective_scan(*(x.double() if torch.is_tensor(x) else x for x in sequence_inputs()))
    long = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="up to 256 states, not 257"):
        ops.selective_scan(long, long, torch.zeros(1, 257), torch.zeros(1, 257, 2), torch.zeros(1, 257, 2))
    many = torch.zeros(1, 65536, 1)
    with pytest.raises(ValueError, match="up to 65535 channels, not 65536"):
        ops.selective_scan(many, many, torch.zeros(65536, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="up to 65535 channels"):
        ops.causal_conv1d(many, torch.zeros(65536, 2))
    assert scan.calls == []


@pytest.mark.parametrize("op", ["directional_scan", "selective_scan", "causal_conv1d"])
def test_tensors_at_odd_addresses(scan, op):
    """A GPU faults where it reads them, so the stand-ins refuse them."""
    inputs = MAKERS[op](**{"height": 2} if op == "directional_scan" else {}, **{
        "width" if op == "directional_scan" else "length": 3})  # fmt: skip
    want = results_and_gradients(call_public, op, inputs)
    odd = {k: at_odd_address(x) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    grads = [at_odd_address(g) for g in output_grads(call_public(op, inputs))]
    for name, x in results_and_gradients(call_public, op, odd, grads).items():
        torch.testing.assert_close(x, want[name])


def test_one_extension_alone_serves_its_operator(scan, monkeypatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    forget()
    assert cuda.why_missing() == ("", "")
    assert cuda.unsupported("selective_scan", torch.float32, 1) == ""
    with pytest.raises(ValueError, match=r"causal_conv1d cannot be used .*pip install"):
        ops.causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(2, 2))


class Broken:
    """An extension module built for another torch."""

    def __getattr__(self, name):
        raise OSError("undefined symbol: _ZN3c10")


def test_a_broken_installation_counts_as_missing(scan, monkeypatch):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    monkeypatch.setitem(sys.modules, "causal_conv1d", Broken())
    forget()
    reason, cure = cuda.why_missing()
    assert "selective_scan_cuda" in reason
    assert "undefined symbol" in reason
    assert "pip install" in cure


def test_mamba_ssm_as_a_whole_is_never_imported(scan, monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # importing it would raise
    ops.selective_scan(*sequence_inputs())
    assert scan.calls == ["fwd"]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_forced_on_cpu_tensors_is_an_error(monkeypatch, backend):
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    with pytest.raises(ValueError, match=rf"SSMAMBA_BACKEND={backend} cannot run .*cuda only, the tensors are on cpu"):
        ops.selective_scan(*sequence_inputs())


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_report_on_a_machine_without_a_gpu():
    report = dispatch.backends()
    for name in ("triton", "cuda"):
        entry = report["backends"][name]
        assert not entry["available"]
        assert "no CUDA or ROCm device" in entry["reason"]
        assert entry["cure"]
