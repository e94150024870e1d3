"""depthwise3x3_: the convolutions of inference, against their float64 definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ssmamba_models.ops.depthwise import depthwise3x3_

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def truth(x, weight, bias, silu=False, residual=False):
    """Tap by tap, in float64, on a map with zeros around it."""
    padded = F.pad(x.double(), (0, 0, 1, 1, 1, 1))
    height, width = x.shape[1:3]
    y = bias.double() + (x.double() if residual else 0)
    for i in range(3):
        for j in range(3):
            y = y + weight[:, 0, i, j].double() * padded[:, i : i + height, j : j + width]
    return y * torch.sigmoid(y) if silu else y


def arguments(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(shape, generator=generator)
    return x, torch.randn(shape[-1], 1, 3, 3, generator=generator), torch.randn(shape[-1], generator=generator)


@pytest.mark.parametrize("backend", ["c", "torch"])
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9), st.integers(1, 70)),
    silu=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_its_definition(backend, shape, silu, residual, seed):
    x, weight, bias = arguments(shape, seed)
    wanted = truth(x, weight, bias, silu, residual)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSMAMBA_BACKEND", backend)
        result = depthwise3x3_(x, weight, bias, silu, residual)
    assert result is x
    torch.testing.assert_close(x.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 5, 4, 64), (2, 3, 6, 200), (7, 4, 4, 320)])
def test_groups_of_any_width_give_the_same(shape, threads):
    """How many channels a task takes follows the batch and the threads."""
    x, weight, bias = arguments(shape)
    wanted = truth(x, weight, bias, silu=True)
    old = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        depthwise3x3_(x, weight, bias, silu=True)
    finally:
        torch.set_num_threads(old)
    torch.testing.assert_close(x.double(), wanted, atol=1e-5, rtol=1e-5)


def test_what_is_not_finite_stays_where_it_is_seen():
    x, weight, bias = arguments((1, 7, 7, 33))
    x[0, 3, 3, 5], x[0, 0, 6, 32] = math.nan, math.inf
    wanted = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=33).permute(0, 2, 3, 1)
    result = depthwise3x3_(x, weight, bias)
    assert torch.equal(result.isfinite(), wanted.isfinite())
    assert 0 < (~result.isfinite()).sum() == 9 + 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_too(dtype):
    x, weight, bias = (t.to(dtype) for t in arguments((2, 5, 6, 20)))
    wanted = truth(x, weight, bias, silu=True, residual=True)
    torch.testing.assert_close(
        depthwise3x3_(x, weight, bias, silu=True, residual=True).double(), wanted, atol=0.1, rtol=0.02
    )


def test_torch_knows_the_operator():
    x, weight, bias = arguments((2, 3, 4, 20))
    torch.library.opcheck(torch.ops.ssmamba.depthwise3x3_.default, (x, weight, bias, True, False))


def test_with_gradients_it_refuses():
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no_grad"):
        depthwise3x3_(*arguments((1, 2, 2, 3)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, weight, bias: (x[0], weight, bias),
        lambda x, weight, bias: (x, weight[:2], bias),
        lambda x, weight, bias: (x, weight[..., :2], bias),
        lambda x, weight, bias: (x, weight, bias[:2]),
        lambda x, weight, bias: (x, weight.double(), bias),
        lambda x, weight, bias: (x.transpose(1, 2), weight, bias),
    ],
)
def test_bad_input_is_named(spoil):
    with pytest.raises(ValueError, match="depthwise3x3_: x is"):
        depthwise3x3_(*spoil(*arguments((2, 3, 4, 5))))
