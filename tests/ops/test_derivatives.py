"""Derivatives that the kernels do not compute: of forward mode, under torch.func, of a gradient."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from scan_cases import MAKERS, call_public, call_reference
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from ssmamba_models.ops.depthwise import depthwise3x3

SMALL = {
    "directional_scan": {"height": 2, "width": 2, "channels": 2, "states": 1, "hold": True, "batch": 1},
    "selective_scan": {"length": 4, "channels": 4, "states": 2, "groups": 2, "batch": 1},
    "causal_conv1d": {"length": 5, "channels": 2, "batch": 1},
}
OPERATORS = list(MAKERS)


class Case:
    """An operator and its definition as functions of their floating tensors alone, and tangents of these."""

    def __init__(self, op: str, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.op, self.inputs = op, MAKERS[op](**SMALL[op], dtype=dtype)
        self.names = [k for k, x in self.inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self.tensors = tuple(self.inputs[name] for name in self.names)
        self.tangents = tuple(torch.randn_like(x) for x in self.tensors)
        self.all = tuple(range(len(self.tensors)))

    def outputs(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return call_public(self.op, self.inputs | dict(zip(self.names, tensors)))

    def number(self, *tensors: torch.Tensor) -> torch.Tensor:
        return sum(y.square().sum() for y in self.outputs(*tensors))

    def true_number(self, *tensors: torch.Tensor) -> torch.Tensor:
        return sum(y.square().sum() for y in call_reference(self.op, self.inputs | dict(zip(self.names, tensors))))


@pytest.fixture(params=OPERATORS)
def case(request) -> Case:
    return Case(request.param)


def along(function, case):
    return jvp(function, case.tensors, case.tangents)[1]


TRANSFORMS = {
    "jvp": along,
    "jacfwd": lambda f, case: jacfwd(f, case.all)(*case.tensors),
    "jacrev": lambda f, case: jacrev(f, case.all)(*case.tensors),
    "hessian": lambda f, case: hessian(f, case.all)(*case.tensors),
    "reverse over reverse": lambda f, case: jacrev(jacrev(f, case.all), case.all)(*case.tensors),
    "forward over reverse": lambda f, case: along(grad(f, case.all), case),
    "reverse over forward": lambda f, case: grad(
        lambda *tensors: jvp(f, tensors, case.tangents)[1], case.all)(*case.tensors),
    "forward over forward": lambda f, case: along(lambda *tensors: jvp(f, tensors, case.tangents)[1], case),
    "jvp of a batch": lambda f, case: vmap(lambda *t: jvp(f, case.tensors, t)[1])(
        *(torch.stack([t, 2 * t]) for t in case.tangents)),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(case, transform):
    found = TRANSFORMS[transform](case.number, case)
    torch.testing.assert_close(found, TRANSFORMS[transform](case.true_number, case))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tangent_needs_no_grad_mode(case, mode):
    want = along(case.true_number, case)
    with mode():
        torch.testing.assert_close(along(case.number, case), want)


def test_each_operand_carries_a_tangent_alone(case):
    for i, name in enumerate(case.names):
        one = lambda f, i=i: jvp(  # noqa: E731
            lambda x: f(*case.tensors[:i], x, *case.tensors[i + 1 :]), (case.tensors[i],), (case.tangents[i],)
        )[1]
        want = one(case.true_number)
        assert want.abs() > 1e-6
        torch.testing.assert_close(one(case.number), want, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("op", OPERATORS)
def test_tangents_on_every_backend(op, backend):
    case = Case(op, torch.float32)
    want = along(lambda *tensors: case.true_number(*(x.double() for x in tensors)), case)
    torch.testing.assert_close(along(case.number, case), want.float(), rtol=1e-4, atol=1e-4)


def registered(case: Case):
    """The operator under the public function, of the floating tensors, as exported and scripted models call it."""

    def call(*tensors):
        inputs = case.inputs | dict(zip(case.names, tensors))
        if case.op == "causal_conv1d":
            inputs["activation"] = inputs["activation"] is not None
        return getattr(torch.ops.ssmamba, case.op)(*inputs.values())

    return call


def test_the_registered_operators_by_themselves(case):
    """Dual numbers and gradients at once, through the operator and the one that computes its gradients."""
    call = registered(case)
    leaves = tuple(x.clone().requires_grad_() for x in case.tensors)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, leaves)
    with pytest.raises(ValueError, match="has shape"):  # a formula would broadcast
        jvp(lambda x: call(x, case.tensors[1][:-1], *case.tensors[2:]), case.tensors[:1], case.tangents[:1])


def test_a_scripted_operator():
    case = Case("causal_conv1d")

    @torch.jit.script
    def scripted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.ssmamba.causal_conv1d(x, weight, bias, True)

    torch.testing.assert_close(along(scripted, case), along(lambda *t: case.outputs(*t)[0], case))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled(case):
    torch._dynamo.reset()
    want = along(case.true_number, case)
    compiled = torch.compile(lambda tensors, tangents: jvp(case.number, tensors, tangents)[1], backend="aot_eager")
    torch.testing.assert_close(compiled(case.tensors, case.tangents), want)

    def dual(x, tangent):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(case.number(forward_ad.make_dual(x, tangent), *case.tensors[1:])).tangent

    found = torch.compile(dual, backend="aot_eager")(case.tensors[0], case.tangents[0])
    torch.testing.assert_close(found, dual(case.tensors[0], case.tangents[0]))


def test_exported(case):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return case.outputs(*tensors)

    module = torch.export.export(Module(), case.tensors).module()
    found, want = (along(f, case) for f in (module, case.outputs))
    torch.testing.assert_close(tuple(found), want)


def test_third_derivatives(case):
    def third(function):
        leaves = [x.clone().requires_grad_() for x in case.tensors]
        y = function(*leaves)
        for _ in range(3):
            y = sum(g.square().sum() for g in torch.autograd.grad(y, leaves, create_graph=True))
        return y

    torch.testing.assert_close(third(case.number), third(case.true_number))


def test_vmap_over_an_operator(case):
    rest = case.tensors[1:]
    batch = torch.stack([case.tensors[0], 2 * case.tensors[0]])
    found = vmap(lambda x: case.outputs(x, *rest))(batch)
    for y, want in zip(found, zip(*(case.outputs(x, *rest) for x in batch))):
        torch.testing.assert_close(y, torch.stack(want))


@pytest.mark.parametrize("op", OPERATORS)
def test_without_tangents_the_kernels_compute(op, monkeypatch):
    """Inside forward mode too, where nothing has a tangent; and plain gradients never take the formulas."""
    from ssmamba_models.ops import vectorized
    from ssmamba_models.ops.cpu import library

    if library.open_library()[0] is None:
        pytest.skip("the C kernels are not built here")
    monkeypatch.delenv("SSMAMBA_BACKEND", raising=False)
    case = Case(op, torch.float32)
    for name in (op, f"{op}_backward"):
        monkeypatch.setattr(vectorized, name, None)
    leaves = tuple(x.clone().requires_grad_() for x in case.tensors)
    torch.autograd.grad(case.number(*leaves), leaves)
    with forward_ad.dual_level():
        case.outputs(*case.tensors)
    with pytest.raises(TypeError, match="NoneType"):
        along(case.number, case)


# ---- the operators that write over their input ----


def convolved(x, weight, bias, silu, residual):
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1)
    y = y + x if residual else y
    return F.silu(y) if silu else y


DEPTHWISE = ((1, 4, 3, 5), (5, 1, 3, 3), (5,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tangents_of_depthwise3x3(dtype):
    torch.manual_seed(0)
    tensors, tangents = (tuple(torch.randn(shape, dtype=dtype) for shape in DEPTHWISE) for _ in range(2))
    public, definition = (functools.partial(f, silu=True, residual=True) for f in (depthwise3x3, convolved))
    torch.testing.assert_close(jvp(public, tensors, tangents), jvp(definition, tensors, tangents))
    for i in range(len(DEPTHWISE)):
        with torch.no_grad(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(t.clone(), v) if i == j else t.clone()
                     for j, (t, v) in enumerate(zip(tensors, tangents))]  # fmt: skip
            want = forward_ad.unpack_dual(definition(*duals)).tangent
            torch.testing.assert_close(forward_ad.unpack_dual(public(*duals)).tangent, want)


# ---- models ----


@pytest.mark.parametrize("size", [64, 256])  # of the larger maps are computed in pieces, in memory that is used again
def test_a_frozen_model_keeps_tangents(size):
    torch.manual_seed(0)
    model = timm.create_model("test_ssmamba", num_classes=0).eval().requires_grad_(False)
    x, direction = torch.randn(2, 1, 3, size, size)
    exact = model.double()
    step = 1e-5 * direction.double()
    with torch.no_grad():
        want = (exact(x.double() + step) - exact(x.double() - step)) / 2e-5
        model.float()
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
        parameters = dict(model.named_parameters())
        call = lambda x: torch.func.functional_call(model, parameters, (x,))  # noqa: E731
        functional = jvp(call, (x,), (direction,))[1]
    for tangent in (got, functional):
        assert (tangent - want).norm() < 1e-3 * want.norm()
