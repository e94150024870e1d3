"""depthwise3x3, norm_linear and residual_mlp against their float64 definitions, with every gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ssmamba_models.ops import reference
from ssmamba_models.ops.depthwise import depthwise3x3
from ssmamba_models.ops.norm_linear import norm_linear
from ssmamba_models.ops.residual_mlp import residual_mlp

OPERATORS = {"depthwise3x3": depthwise3x3, "norm_linear": norm_linear, "residual_mlp": residual_mlp}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Not fewer channels: where their variance may be near 0, a norm divides rounding errors by it.
SHAPES = st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 9), st.integers(8, 70))


def make(op, shape, dtype=torch.float32, seed=0, outputs=21):
    """Tensor arguments and the others; parameters are as the operators want them beside x."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[-1]

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, norm = draw(*shape), (1 + 0.3 * draw(channels), draw(channels))
    if op == "depthwise3x3":
        parameters, others = (draw(channels, 1, 3, 3) / 3, draw(channels)), (bool(seed & 1), bool(seed & 2))
    elif op == "norm_linear":
        parameters, others = (*norm, draw(outputs, channels) / channels**0.5), (1e-6,)
    else:
        inner = draw(outputs, channels) / channels**0.5, draw(outputs)
        parameters, others = (*norm, *inner, draw(channels, outputs) / outputs**0.5, draw(channels)), (1e-6, 1.25)
    wide = torch.promote_types(dtype, torch.float32)
    return [x.to(dtype), *(p.to(wide) for p in parameters)], others


def gradients(function, tensors, others, grad):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*tensors, *others)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(t.grad for t in tensors)]


def distance(found, wanted):
    assert found.shape == wanted.shape
    if not wanted.numel():
        return 0.0
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-3 * math.sqrt(wanted.numel()))).item()


def assert_like_definition(op, tensors, others, dtype):
    grad = torch.randn(OPERATORS[op](*tensors, *others).shape, dtype=torch.float64).to(dtype)
    found = gradients(OPERATORS[op], tensors, others, grad)
    wanted = gradients(getattr(reference, op), [t.double() for t in tensors], others, grad.double())
    assert found[0].dtype == dtype
    assert [t.dtype for t in found[1:]] == [t.dtype for t in tensors]
    assert [distance(f, w) for f, w in zip(found, wanted)] == pytest.approx([0.0] * len(found), abs=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("op", OPERATORS)
@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 99), outputs=st.integers(1, 40))
def test_it_is_its_definition(op, backend, shape, seed, outputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSMAMBA_BACKEND", backend)
        assert_like_definition(op, *make(op, shape, seed=seed, outputs=outputs), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("seed", range(4))
def test_in_other_types(op, dtype, seed):
    assert_like_definition(op, *make(op, (2, 5, 6, 37), dtype, seed), dtype)


@pytest.mark.parametrize("op", ["norm_linear", "residual_mlp"])
def test_pieces_of_a_map_add_up(op, monkeypatch):
    monkeypatch.setattr("ssmamba_models.ops.rowwise.PIECE_ELEMENTS", 1)  # pieces of 64 rows
    assert_like_definition(op, *make(op, (2, 9, 11, 20)), torch.float32)


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_norm_linear_adds_to_a_residual(scale):
    tensors, others = make("norm_linear", (2, 3, 4, 20))
    residual = torch.randn(2, 3, 4, 21)

    def with_residual(function):
        return lambda x, *rest: function(*[x, *rest[:3]], *others, rest[3], scale)

    tensors = [*tensors, residual]
    grad = torch.randn(2, 3, 4, 21)
    found = gradients(with_residual(norm_linear), tensors, (), grad)
    wanted = gradients(with_residual(reference.norm_linear), [t.double() for t in tensors], (), grad.double())
    assert max(distance(f, w) for f, w in zip(found, wanted)) < 1e-5


@pytest.mark.parametrize("op", OPERATORS)
def test_strided_inputs_and_gradients(op):
    tensors, others = make(op, (2, 5, 6, 40))
    strided = [tensors[0].transpose(1, 2)[..., ::2], *make(op, (2, 6, 5, 20))[0][1:]]
    function = OPERATORS[op]
    wanted = function(*(t.contiguous() for t in strided), *others)
    assert torch.equal(function(*strided, *others), wanted)
    leaf = strided[0].detach().clone().requires_grad_()
    grad = torch.randn(wanted.shape[::-1]).permute(3, 2, 1, 0)
    function(leaf, *strided[1:], *others).backward(grad)
    first, leaf.grad = leaf.grad, None
    function(leaf, *strided[1:], *others).backward(grad.contiguous())
    assert torch.equal(first, leaf.grad)


@pytest.mark.parametrize("op", OPERATORS)
def test_results_do_not_depend_on_threads(op):
    tensors, others = make(op, (3, 17, 19, 72), seed=3, outputs=96)
    grad = torch.randn(OPERATORS[op](*tensors, *others).shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradients(OPERATORS[op], tensors, others, grad))
    finally:
        torch.set_num_threads(before)
    # Those of matrix products are the library's affair.
    exact = slice(None) if op == "depthwise3x3" else slice(0, 0)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][exact], result[exact]))
        assert max(distance(a, b.double()) for a, b in zip(results[0], result)) < 1e-6


@pytest.mark.parametrize("op", OPERATORS)
def test_torch_knows_the_operator(op):
    tensors, others = make(op, (2, 3, 4, 20))
    tensors = [t.requires_grad_() for t in tensors]
    others = {"norm_linear": (*others, None, 1.0), "residual_mlp": (*others, True)}.get(op, others)
    torch.library.opcheck(getattr(torch.ops.ssmamba, op).default, (*tensors, *others))


@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_whole(op):
    tensors, others = make(op, (2, 3, 4, 20))
    compiled = torch.compile(OPERATORS[op], fullgraph=True, backend="aot_eager")
    grad = torch.randn(OPERATORS[op](*tensors, *others).shape)
    for a, b in zip(gradients(compiled, tensors, others, grad), gradients(OPERATORS[op], tensors, others, grad)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", OPERATORS)
def test_autocast_casts_the_map_alone(op):
    tensors, others = make(op, (2, 3, 4, 20))
    tensors = [t.requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y = OPERATORS[op](*tensors, *others)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    wanted = getattr(reference, op)(*tensors, *others)
    assert distance(y, wanted.double()) < 1e-2


@pytest.mark.parametrize("op", OPERATORS)
def test_second_derivatives(op):
    def second(function, tensors):
        tensors = [t.detach().clone().requires_grad_() for t in tensors]
        grads = torch.autograd.grad(function(*tensors, *others).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    tensors, others = make(op, (1, 3, 4, 5), torch.float64, seed=3)
    for found, wanted in zip(second(OPERATORS[op], tensors), second(getattr(reference, op), tensors)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("op", OPERATORS)
def test_tangents(op):
    tensors, others = make(op, (1, 3, 4, 5), seed=3)
    tangents = [torch.randn_like(t) for t in tensors]
    call = lambda function: lambda *t: function(*t, *others)  # noqa: E731
    _, found = torch.func.jvp(call(OPERATORS[op]), tuple(tensors), tuple(tangents))
    _, wanted = torch.func.jvp(call(getattr(reference, op)), tuple(tensors), tuple(tangents))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("op", OPERATORS)
def test_flops_are_counted(op):
    tensors, others = make(op, (2, 3, 4, 20))
    tensors = [t.requires_grad_() for t in tensors]
    with FlopCounterMode(display=False) as counter:
        OPERATORS[op](*tensors, *others).sum().backward()
    once = 24 * {"depthwise3x3": 18 * 20, "norm_linear": 2 * 20 * 21, "residual_mlp": 4 * 20 * 21}[op]
    assert counter.get_total_flops() == 3 * once


def test_what_is_not_finite_stays_where_it_is_seen():
    (x, weight, bias), _ = make("depthwise3x3", (1, 7, 7, 33))
    x[0, 3, 3, 5], x[0, 0, 6, 32] = math.nan, math.inf
    assert (~depthwise3x3(x, weight, bias).isfinite()).sum() == 9 + 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 7.0, -7.0])
def test_gelu_far_out(value):
    """Weights that hand x through: the norm's bias is the hidden value."""
    one, zero = torch.ones(1, 1), torch.zeros(1)
    tensors = [zero[None], torch.ones(1), torch.tensor([value]), one, zero, one, zero]
    found = gradients(residual_mlp, tensors, (), one)
    wanted = gradients(
        lambda x, nw, nb, *_: torch.nn.functional.gelu(nb.double() * nw.double())[None] + x, tensors, (), one
    )
    torch.testing.assert_close(found[0], wanted[0].float(), equal_nan=True)
    if math.isfinite(value):
        torch.testing.assert_close(found[3], wanted[3], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("op", "spoil", "message"),
    [
        ("depthwise3x3", lambda x, w, b: (x[0], w, b), "x has shape"),
        ("depthwise3x3", lambda x, w, b: (x, w[:2], b), "weight has shape"),
        ("depthwise3x3", lambda x, w, b: (x, w[..., :2], b), "weight has shape"),
        ("depthwise3x3", lambda x, w, b: (x, w, b[:2]), "bias has shape"),
        ("norm_linear", lambda x, nw, nb, w: (x[..., :2], nw, nb, w), "x has shape"),
        ("norm_linear", lambda x, nw, nb, w: (x, nw[:2], nb, w), "norm_weight has shape"),
        ("norm_linear", lambda x, nw, nb, w: (x, nw, nb, w[None]), "weight has shape"),
        ("residual_mlp", lambda x, nw, nb, a, b, c, d: (x, nw, nb, a, b, c.T, d), "weight2 has shape"),
        ("residual_mlp", lambda x, nw, nb, a, b, c, d: (x, nw, nb, a, b[:2], c, d), "bias1 has shape"),
        ("residual_mlp", lambda x, nw, nb, a, b, c, d: (x[..., :2], nw, nb, a, b, c, d), "x has shape"),
    ],
)
def test_bad_shapes_are_named(op, spoil, message):
    tensors, others = make(op, (2, 3, 4, 5))
    with pytest.raises(ValueError, match=f"{op}: {message}"):
        OPERATORS[op](*spoil(*tensors), *others)


@pytest.mark.parametrize("op", OPERATORS)
def test_other_things_than_numbers_are_refused(op):
    tensors, others = make(op, (2, 3, 4, 5))
    with pytest.raises(TypeError, match=f"{op}: x has dtype"):
        OPERATORS[op](tensors[0].long(), *tensors[1:], *others)
