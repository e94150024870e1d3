"""bias_gelu_: the activation of inference, against its float64 definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmamba_models.ops.bias_gelu import bias_gelu_

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def truth(x, bias):
    """x Phi(x) in float64; erfc keeps the digits of small tails."""
    z = x.double() + bias.double()
    return z * 0.5 * torch.special.erfc(-z / math.sqrt(2))


@pytest.mark.parametrize("backend", ["c", "torch"])
@given(rows=st.integers(0, 5), width=st.integers(0, 70), seed=st.integers(0, 99))
def test_it_is_its_definition(backend, rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x, bias = 4 * torch.randn(rows, width, generator=generator), torch.randn(width, generator=generator)
    wanted = truth(x, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSMAMBA_BACKEND", backend)
        result = bias_gelu_(x, bias)
    assert result is x
    torch.testing.assert_close(x.double(), wanted, atol=1e-6, rtol=1e-6)


def test_over_its_whole_range_it_errs_by_units_in_the_last_place():
    x = torch.linspace(-20, 20, 1_000_003)[None]
    wanted = truth(x, torch.zeros(()))
    error = (bias_gelu_(x.clone(), torch.zeros(x.shape[1])).double() - wanted).abs()
    assert (error / x.double().abs().clamp_min(1)).max() < 3e-7


def test_what_is_not_finite_is_as_in_torch():
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, 3e38]])
    wanted = torch.nn.functional.gelu(x.double()).float()  # in float32 torch's with AVX-512 makes NaN of infinity
    torch.testing.assert_close(bias_gelu_(x, torch.zeros(7)), wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_too(dtype):
    x, bias = torch.randn(3, 33).to(dtype), torch.randn(33).to(dtype)
    wanted = truth(x, bias)
    torch.testing.assert_close(bias_gelu_(x, bias).double(), wanted, atol=0.03, rtol=0.02)


def test_torch_knows_the_operator():
    torch.library.opcheck(torch.ops.ssmamba.bias_gelu_.default, (torch.randn(3, 20), torch.randn(20)))


def test_with_gradients_it_refuses():
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no_grad"):
        bias_gelu_(torch.randn(2, 3), torch.randn(3))


@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.float64)),
        (torch.zeros(3, 2).t(), torch.zeros(3)),
    ],
)
def test_bad_input_is_named(x, bias):
    with pytest.raises(ValueError, match="bias_gelu_: x is"):
        bias_gelu_(x, bias)
