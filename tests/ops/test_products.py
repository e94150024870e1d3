"""Products for inference: both libraries' are their definition, and the faster one is taken."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from ssmamba_models.ops import products

pytestmark = pytest.mark.usefixtures("no_gradients")
needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="this torch has no oneDNN"
)
KINDS = {
    "torch": lambda weight, bias, grain: products.TorchProduct(weight, bias),
    "packed": products.PackedProduct,
}
both = pytest.mark.parametrize("kind", ["torch", pytest.param("packed", marks=needs_onednn)])


@pytest.fixture(scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def gelu(x):
    """x Phi(x); erfc keeps the digits of small tails."""
    return x * 0.5 * torch.special.erfc(-x / math.sqrt(2))


@both
@given(
    rows=st.integers(1, 70),
    grain=st.integers(1, 20),
    ins=st.integers(1, 70),
    outs=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_they_are_their_definition(kind, rows, grain, ins, outs, seed):
    draw = torch.Generator().manual_seed(seed)
    x, weight, bias, start = (
        torch.randn(*shape, generator=draw) for shape in ((rows, ins), (outs, ins), (outs,), (rows, outs))
    )
    wanted = x.double() @ weight.double().T
    plain, biased = KINDS[kind](weight, None, grain), KINDS[kind](weight, bias, grain)
    out = torch.full((rows, outs), math.nan)
    plain.into(out, x)
    torch.testing.assert_close(out.double(), wanted, atol=2e-5, rtol=1e-5)
    for product, added in ((plain, 0), (biased, bias)):
        out = start.clone()
        product.add_to(out, x)
        torch.testing.assert_close(out.double(), start + wanted + added, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(biased.gelu(x).double(), gelu(wanted + bias), atol=2e-5, rtol=1e-5)


@both
def test_gelu_over_its_whole_range(kind):
    x = torch.linspace(-20, 20, 100_003)[:, None]
    result = KINDS[kind](torch.ones(1, 1), torch.zeros(1), 64).gelu(x).double()
    assert ((result - gelu(x.double())).abs() / x.double().abs().clamp_min(1)).max() < 5e-7


@needs_onednn
def test_a_part_of_a_larger_map_is_taken_as_it_lies():
    x, out, weight = torch.randn(40, 24)[8:24], torch.zeros(40, 12), torch.randn(12, 24)
    products.PackedProduct(weight, None, 16).into(out[8:24], x)
    torch.testing.assert_close(out[8:24], x @ weight.T, atol=1e-5, rtol=1e-5)
    assert not out[:8].any()
    assert not out[24:].any()


@needs_onednn
@pytest.mark.parametrize(
    ("cpu", "capability", "mkl", "packed"),
    [
        ("vendor_id\t: AuthenticAMD\n", "AVX512", True, True),
        ("vendor_id\t: AuthenticAMD\n", "AVX512", False, False),
        ("vendor_id\t: AuthenticAMD\n", "AVX2", True, False),
        ("vendor_id\t: GenuineIntel\n", "AVX512", True, False),
        (None, "AVX512", True, True),
    ],
)
def test_the_faster_one_is_taken(monkeypatch, tmp_path, cpu, capability, mkl, packed):
    """On a Linux machine by /proc/cpuinfo, on others by what Python says."""
    told = tmp_path / "cpuinfo"
    if cpu is not None:
        told.write_text(cpu)
    monkeypatch.setattr(products, "_CPUS", told)
    monkeypatch.setattr(products.platform, "processor", lambda: "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    products.is_packed_faster.cache_clear()
    try:
        assert products.is_packed_faster() is packed
    finally:
        products.is_packed_faster.cache_clear()


@needs_onednn
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_onednn_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(products, "is_packed_faster", lambda: True)
    weight = torch.randn(3, 4)
    assert isinstance(products.product(weight, None, torch.randn(2, 4), 5), products.PackedProduct)
    with torch.backends.mkldnn.flags(enabled=False):
        assert isinstance(products.product(weight, None, torch.randn(2, 4), 5), products.TorchProduct)


@needs_onednn
@pytest.mark.parametrize("strided", [lambda x: x[::2], lambda x: x[:1].expand(8)])
def test_a_bias_may_have_strides(strided):
    weight, x, bias = torch.randn(8, 6), torch.randn(5, 6), strided(torch.randn(16))
    out = torch.zeros(5, 8)
    products.PackedProduct(weight, bias, 5).add_to(out, x)
    torch.testing.assert_close(out, x @ weight.T + bias, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_tangents_are_not_lost(monkeypatch):
    """oneDNN's operator knows no derivatives; torch's own say that theirs do not write over a tensor."""
    monkeypatch.setattr(products, "is_packed_faster", lambda: True)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(2, 4), torch.randn(2, 4))
        assert isinstance(products.product(torch.randn(3, 4), None, x, 5), products.TorchProduct)


@needs_onednn
def test_pieces_of_many_lengths_are_few_to_the_library(monkeypatch):
    """It keeps a kernel for every number of rows that it has met."""
    met = set()
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, *rest: met.add(len(x)) or real(x, *rest))
    packed = products.PackedProduct(torch.randn(3, 4), None, 10)
    for rows in range(1, 161):
        assert packed._linear(torch.randn(rows, 4)).shape == (rows, 3)
    assert met == set(range(10, 161, 10))
