"""Arguments that do not fit: the right exception, and a message that names the argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scan_cases import MAKERS

from ssmamba_models import ops

SHAPES = {
    "directional_scan": {"height": 3, "width": 4, "channels": 6, "states": 2, "hold": True},
    "selective_scan": {"length": 5, "channels": 6, "states": 2, "groups": 2},
    "causal_conv1d": {"length": 5, "channels": 6, "taps": 3},
}


def wrong_rank(x):
    return x[None]


def one_more(x):
    return torch.cat([x, x[..., :1]], -1)


def as_int(x):
    return x.int()


def as_complex(x):
    return x.to(torch.complex64)


def as_numpy(x):
    return np.asarray(x)


def on_meta(x):
    return x.to("meta")


TENSORS = {
    "directional_scan": ("u", "delta", "A", "B", "C", "D", "delta_bias"),
    "selective_scan": ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
    "causal_conv1d": ("x", "weight", "bias"),
}
ALTERATIONS = {
    wrong_rank: (ValueError, "shape"),
    one_more: (ValueError, "shape"),
    as_int: (TypeError, "int32"),
    as_complex: (TypeError, "complex"),
    as_numpy: (TypeError, "ndarray"),
    on_meta: (ValueError, "meta"),
}


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in TENSORS.items() for name in names])
def test_a_tensor_that_does_not_fit(op, name, alter):
    kind, word = ALTERATIONS[alter]
    if alter is one_more and (op == "causal_conv1d" and name != "bias"):
        pytest.skip("another length, or another width of the kernel, is a good argument")
    inputs = MAKERS[op](**SHAPES[op])
    inputs[name] = alter(inputs[name])
    first = next(iter(inputs))
    with pytest.raises(kind) as error:
        getattr(ops, op)(**inputs)
    message = str(error.value)
    assert message.startswith(f"{op}: ")
    assert word in message
    if (name == first and alter in (one_more, on_meta)) or (name == "A" and alter is one_more):
        return  # u says how many channels there are, A how many states: the message names what disagrees with them
    assert name in message.removeprefix(f"{op}: ").split(" "), message


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, names in {"directional_scan": "delta B C", "selective_scan": "delta B C z"}.items()
     for name in names.split()],
)  # fmt: skip
def test_activations_of_two_dtypes(op, name):
    inputs = MAKERS[op](**SHAPES[op])
    inputs[name] = inputs[name].bfloat16()
    with pytest.raises(TypeError, match=rf"{name} is torch\.bfloat16.*float32"):
        getattr(ops, op)(**inputs)


@pytest.mark.parametrize("op", list(MAKERS))
def test_a_required_argument_that_is_none(op):
    name = TENSORS[op][1]
    with pytest.raises(TypeError, match=f"{name} .*NoneType"):
        getattr(ops, op)(**(MAKERS[op](**SHAPES[op]) | {name: None}))


@pytest.mark.parametrize(
    ("hold", "kind", "words"),
    [
        (torch.zeros(2, 3, 4), TypeError, "hold must be a bool tensor, not torch.float32"),
        ([[True]], TypeError, "hold must be a bool tensor, not list"),
        (torch.zeros(2, 4, 3, dtype=torch.bool), ValueError, "shape (2, 4, 3), expected (B, H, W) = (2, 3, 4)"),
        (torch.zeros(2, 3, 4, dtype=torch.bool, device="meta"), ValueError, "hold is on meta"),
    ],
)
def test_a_hold_mask_that_does_not_fit(hold, kind, words):
    inputs = MAKERS["directional_scan"](**SHAPES["directional_scan"])
    with pytest.raises(kind) as error:
        ops.directional_scan(**(inputs | {"hold": hold}))
    assert words in str(error.value)


@pytest.mark.parametrize("op", ["directional_scan", "selective_scan"])
def test_no_states(op):
    inputs = MAKERS[op](**(SHAPES[op] | {"states": 0}))
    with pytest.raises(ValueError, match=r"A has shape .*at least one state"):
        getattr(ops, op)(**inputs)


def test_two_directions_only():
    inputs = MAKERS["directional_scan"](**SHAPES["directional_scan"])
    with pytest.raises(ValueError, match=r"A has shape \(2, 6, 2\).*\(4, 6, 2\)"):
        ops.directional_scan(**(inputs | {"A": inputs["A"][:2]}))


def test_groups_that_do_not_divide_the_channels():
    inputs = MAKERS["selective_scan"](length=5, channels=6, states=2, groups=4)
    with pytest.raises(ValueError, match=r"B has 4 groups, .*divides the 6 channels"):
        ops.selective_scan(**inputs)


def test_groups_of_B_and_C_that_differ():
    inputs = MAKERS["selective_scan"](**SHAPES["selective_scan"])
    other = MAKERS["selective_scan"](**(SHAPES["selective_scan"] | {"groups": 3}))
    with pytest.raises(ValueError, match="B has 2 groups and C has 3"):
        ops.selective_scan(**(inputs | {"C": other["C"]}))


def registered(op, **changes):
    """A call of the registered operator itself, as a scripted or exported model makes it: no public function before."""
    inputs = MAKERS[op](**SHAPES[op]) | changes
    if op == "causal_conv1d":
        return torch.ops.ssmamba.causal_conv1d(inputs["x"], inputs["weight"], inputs["bias"], False)
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias", "hold")
    return torch.ops.ssmamba.directional_scan(*(inputs[name] for name in names))


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"),
    [
        ("directional_scan", {"delta": torch.zeros(2, 3, 4, 6, dtype=torch.bfloat16)}, TypeError, "one dtype"),
        ("directional_scan", {"delta": torch.zeros(2, 2, 2, 6)}, ValueError, "delta has shape"),
        ("directional_scan", {"B": torch.zeros(2, 2, 2, 4, 2)}, ValueError, "B has shape"),
        ("directional_scan", {"A": torch.zeros(4, 6, 2, dtype=torch.float64)}, TypeError, "expected torch.float32"),
        ("causal_conv1d", {"weight": torch.zeros(3, 3)}, ValueError, "weight has shape"),
        ("causal_conv1d", {"weight": torch.zeros(6, 6)}, ValueError, "W = 2, 3 or 4"),
    ],
)
def test_a_registered_operator_never_reads_past_its_tensors(op, changes, error, message):
    with pytest.raises(error, match=message):
        registered(op, **changes)


def test_a_registered_backward_checks_its_gradient():
    inputs = MAKERS["causal_conv1d"](**SHAPES["causal_conv1d"])
    with pytest.raises(ValueError, match="gradient has shape"):
        torch.ops.ssmamba.causal_conv1d_backward(
            torch.zeros(1, 6, 2), inputs["x"], inputs["weight"], inputs["bias"], False
        )


def test_float8_is_refused():
    inputs = MAKERS["causal_conv1d"](**SHAPES["causal_conv1d"])
    with pytest.raises(TypeError, match=r"x has dtype torch.float8_e4m3fn, expected one of float32"):
        ops.causal_conv1d(inputs["x"].to(torch.float8_e4m3fn), inputs["weight"])


def test_zero_groups():
    inputs = MAKERS["selective_scan"](**SHAPES["selective_scan"])
    with pytest.raises(ValueError, match="B has 0 groups"):
        ops.selective_scan(**(inputs | {"B": inputs["B"][:, :0], "C": inputs["C"][:, :0]}))


@pytest.mark.parametrize("taps", [0, 1, 5])
def test_a_convolution_of_another_width(taps):
    inputs = MAKERS["causal_conv1d"](length=5, channels=6, taps=taps)
    with pytest.raises(ValueError, match=rf"weight has shape \(6, {taps}\).*W = 2, 3 or 4"):
        ops.causal_conv1d(**inputs)


@pytest.mark.parametrize("activation", ["relu", "SiLU", True])
def test_an_unknown_activation(activation):
    inputs = MAKERS["causal_conv1d"](length=5, channels=6) | {"activation": activation}
    with pytest.raises(ValueError, match=f"activation is {activation!r}, expected None"):
        ops.causal_conv1d(**inputs)


@pytest.mark.parametrize("op", list(MAKERS))
def test_errors_come_before_anything_is_written(op):
    """A refused call leaves its arguments as they were."""
    inputs = MAKERS[op](**SHAPES[op])
    before = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    with pytest.raises(TypeError):
        getattr(ops, op)(**(inputs | {TENSORS[op][-1]: "bias"}))
    assert all(torch.equal(x, before[k]) for k, x in inputs.items() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("op", list(SHAPES))
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("sparse_coo", torch.Tensor.to_sparse),
        ("sparse_csr", lambda x: x.flatten(1).to_sparse_csr()),
        ("_mkldnn", torch.Tensor.to_mkldnn),
        ("nested", lambda x: torch.nested.nested_tensor(list(x))),
        ("nested", lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged)),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_only_dense_tensors(op, kind, make):
    inputs = MAKERS[op](**SHAPES[op])
    for name in list(inputs)[:2]:
        with pytest.raises(TypeError, match=f"{op}: {name} is a {kind} tensor; .*to_dense"):
            getattr(ops, op)(**inputs | {name: make(inputs[name])})


def test_depthwise3x3_names_what_does_not_fit():
    from ssmamba_models.ops.depthwise import depthwise3x3

    x, weight, bias = torch.zeros(1, 2, 2, 3), torch.zeros(3, 1, 3, 3), torch.zeros(3)
    with pytest.raises(TypeError, match="depthwise3x3: weight has dtype"):
        depthwise3x3(x, weight.long(), bias)
    with pytest.raises(TypeError, match="depthwise3x3: x is a sparse_coo tensor"):
        depthwise3x3(x.to_sparse(), weight, bias)
    with pytest.raises(ValueError, match=r"depthwise3x3: weight has shape \(4, 1, 3, 3\)"):
        depthwise3x3(x, torch.zeros(4, 1, 3, 3), bias)
    with pytest.raises(ValueError, match="depthwise3x3: bias has shape"):
        torch.ops.ssmamba.depthwise3x3(x, weight, torch.zeros(2), False, False)
