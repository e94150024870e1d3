"""What torch asks of an operator: opcheck, compile, export, checkpointing, autocast, FLOPs, threads, forks, layouts."""

from __future__ import annotations

import inspect
import multiprocessing
import threading

import pytest
import torch
from scan_cases import (
    MAKERS,
    TOLERANCE,
    assert_close_to_truth,
    at_odd_address,
    call_public,
    call_reference,
    output_grads,
    results_and_gradients,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ssmamba_models import ops
from ssmamba_models.ops.cpu import backend as c_backend

SMALL = {
    "directional_scan": {"height": 3, "width": 4, "channels": 6, "states": 2, "hold": True},
    "selective_scan": {"length": 7, "channels": 6, "states": 2, "groups": 2},
    "causal_conv1d": {"length": 7, "channels": 6},
}
# Enough work for several threads.
LARGE = {
    "directional_scan": {"height": 20, "width": 13, "channels": 35, "states": 2, "batch": 2, "hold": True},
    "selective_scan": {"length": 301, "channels": 35, "states": 3, "batch": 3},
    "causal_conv1d": {"length": 1001, "channels": 35, "batch": 4},
}
OPERATORS = list(MAKERS)


def leaves_of(inputs):
    return {
        k: x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in inputs.items()
    }


def positional(op: str, inputs) -> tuple:
    """Arguments of the registered operator under the public function."""
    inputs = dict(inputs)
    if op == "causal_conv1d":
        inputs["activation"] = inputs["activation"] is not None
    return tuple(inputs.values())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("op", OPERATORS)
def test_torchs_default_dtype_matters_nothing(op, default):
    inputs = MAKERS[op](**SMALL[op])
    expected = results_and_gradients(call_public, op, inputs)
    torch.set_default_dtype(default)
    try:
        found = results_and_gradients(call_public, op, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ---- registration ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op, optional, dtype):
    """torch's four tests: schema, autograd registration, fake tensors, and all of it under compilation."""
    arguments = dict(SMALL[op])
    if not optional:
        arguments |= {"bias": False} | ({} if op == "causal_conv1d" else {"skip": False})
        arguments |= {"hold": False} if op == "directional_scan" else {}
        arguments |= {"gate": False} if op == "selective_scan" else {}
    inputs = leaves_of(MAKERS[op](**arguments, dtype=dtype))
    # The gradients of compiled and eager bfloat16 differ by its rounding; torch 2.6 has tolerances of its own.
    known = inspect.signature(torch.library.opcheck).parameters
    tolerance = {name: TOLERANCE[dtype] for name in ("rtol", "atol") if name in known}
    results = torch.library.opcheck(
        getattr(torch.ops.ssmamba, op).default, positional(op, inputs),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        **tolerance,
    )  # fmt: skip
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", OPERATORS)
def test_the_meta_device_gives_shapes(op):
    inputs = MAKERS[op](**SMALL[op])
    on_meta = {k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    for y, want in zip(call_public(op, on_meta), call_public(op, inputs)):
        assert y.device.type == "meta"
        assert (y.shape, y.dtype, y.stride()) == (want.shape, want.dtype, want.stride())


def compiled_matches(op, backend, **options):
    torch._dynamo.reset()
    inputs = MAKERS[op](**SMALL[op])
    want = results_and_gradients(call_public, op, inputs)
    function = torch.compile(lambda kwargs: call_public(op, kwargs), fullgraph=True, backend=backend, **options)
    found = results_and_gradients(lambda _, kwargs: function(kwargs), op, inputs)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("op", OPERATORS)
def test_compile_in_one_graph_with_backward(op):
    compiled_matches(op, "aot_eager")


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    function = torch.compile(ops.directional_scan, fullgraph=True, backend="aot_eager", dynamic=True)
    for height, width in ((3, 4), (5, 3), (2, 7)):
        inputs = MAKERS["directional_scan"](height, width, channels=6)
        torch.testing.assert_close(function(**inputs), ops.directional_scan(**inputs))


@pytest.mark.slow
def test_compile_with_inductor():
    import torch._inductor.cpp_builder as builder

    try:
        builder.get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"inductor finds no C++ compiler ({error})")
    compiled_matches("directional_scan", "inductor")


@pytest.mark.parametrize("op", OPERATORS)
def test_export(op):
    class Module(torch.nn.Module):
        def forward(self, inputs):
            return call_public(op, inputs)

    inputs = MAKERS[op](**SMALL[op])
    program = torch.export.export(Module(), (inputs,))
    assert any(str(node.target).startswith(f"ssmamba.{op}") for node in program.graph.nodes)
    for y, want in zip(program.module()(inputs), call_public(op, inputs)):
        assert torch.equal(y, want)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("op", OPERATORS)
def test_checkpointing_changes_no_gradient(op, use_reentrant):
    inputs = MAKERS[op](**SMALL[op])
    names = [k for k, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def again(op, leaves):
        # Reentrant checkpointing sees tensors among its own arguments only.
        call = lambda *tensors: call_public(op, leaves | dict(zip(names, tensors)))  # noqa: E731
        return checkpoint(call, *(leaves[k] for k in names), use_reentrant=use_reentrant)

    want = results_and_gradients(call_public, op, inputs)
    found = results_and_gradients(again, op, inputs)
    for name in want:
        assert torch.equal(found[name], want[name]), name


@pytest.mark.parametrize("op", OPERATORS)
def test_no_gradient_is_kept_without_need(op):
    inputs = MAKERS[op](**SMALL[op])
    assert call_public(op, inputs)[0].grad_fn is None
    first = next(iter(inputs))
    leaves = inputs | {first: inputs[first].clone().requires_grad_()}
    call_public(op, leaves)[0].sum().backward()
    assert leaves[first].grad.abs().sum() > 0
    assert all(x.grad is None for k, x in leaves.items() if k != first and isinstance(x, torch.Tensor))


# ---- precision ----


@pytest.mark.parametrize("op", OPERATORS)
def test_autocast_casts_activations_alone(op, backend):
    """bfloat16 out; A, D and biases enter the recurrence as they are; gradients in the inputs' own dtypes."""
    inputs = MAKERS[op](**SMALL[op])

    def autocast(op, leaves):
        with torch.autocast("cpu", torch.bfloat16):
            return call_public(op, leaves)

    found = results_and_gradients(autocast, op, inputs)
    assert found["y"].dtype == torch.bfloat16
    if op == "selective_scan":
        assert found["state"].dtype == torch.float32
    for name in inputs:
        if name in found:
            assert found[name].dtype == torch.float32, name
    # The same as casting the activations by hand, bit for bit: so nothing else was cast.
    activations = {"u", "delta", "B", "C", "z", "x"}
    by_hand = {k: x.bfloat16() if k in activations and x is not None else x for k, x in inputs.items()}
    for y, want in zip(autocast(op, inputs), call_public(op, by_hand)):
        assert torch.equal(y, want)


def test_autocast_to_float16_and_off():
    inputs = MAKERS["directional_scan"](3, 4)
    with torch.autocast("cpu", torch.float16):
        assert ops.directional_scan(**inputs).dtype == torch.float16
        with torch.autocast("cpu", enabled=False):
            assert ops.directional_scan(**inputs).dtype == torch.float32


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.directional_scan(**MAKERS["directional_scan"](3, 4, dtype=torch.float64)).dtype == torch.float64


def test_autocast_mends_mixed_dtypes():
    """Under autocast one layer may give bfloat16 and another float32, as torch's own operators accept."""
    inputs = MAKERS["directional_scan"](3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.directional_scan(**(inputs | {"delta": inputs["delta"].bfloat16()}))
        assert torch.equal(y, ops.directional_scan(**inputs))


@pytest.mark.parametrize("op", OPERATORS)
def test_parameters_may_be_narrow(op, backend):
    """A model cast to bfloat16 has bfloat16 A, D and biases too: they are read as they are, in float32."""
    inputs = {
        k: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in MAKERS[op](**SMALL[op]).items()
    }
    assert_close_to_truth(op, inputs)


# ---- FLOPs ----


def test_flops_of_the_scans():
    """Linear in pixels and channels; the backward pass counts as well."""

    def count(op, backward=False, **arguments):
        inputs = leaves_of(MAKERS[op](**arguments))
        with FlopCounterMode(display=False) as counter:
            y = call_public(op, inputs)[0]
            if backward:
                y.sum().backward()
        return counter.get_total_flops()

    # 4 directions, 6 pixels, 5 channels: 7 operations per state and 4 per channel.
    assert count("directional_scan", height=2, width=3, channels=5, states=2, batch=1) == 4 * 6 * 5 * (7 * 2 + 4)
    assert count("selective_scan", length=6, channels=5, states=2, batch=3) == 3 * 6 * 5 * (7 * 2 + 6)
    assert count("causal_conv1d", length=6, channels=5, taps=3, batch=2, silu=False) == 2 * 6 * 5 * 2 * 3
    for op in OPERATORS:
        once = count(op, **SMALL[op])
        assert count(op, **SMALL[op], batch=6) == 3 * once
        assert count(op, True, **SMALL[op]) > 2 * once


# ---- determinism and threads ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPERATORS)
def test_results_do_not_depend_on_threads_or_chance(op, dtype, threads, fast_backend):
    inputs = MAKERS[op](**LARGE[op], dtype=dtype)
    close = {"rtol": 1e-2 if dtype != torch.float32 else 1e-4, "atol": 1e-4}
    threads(1)
    want = results_and_gradients(call_public, op, inputs)
    for count in (2, 3, 2, 1):
        threads(count)
        found = results_and_gradients(call_public, op, inputs)
        for name in want:
            if fast_backend == "c":
                assert torch.equal(found[name], want[name]), f"{name} with {count} threads"
            else:  # torch's own sums may be split among threads
                torch.testing.assert_close(found[name], want[name], **close)


@pytest.mark.parametrize("op", OPERATORS)
def test_an_image_does_not_depend_on_its_batch(op, fast_backend):
    inputs = MAKERS[op](**LARGE[op])
    y = call_public(op, inputs)[0]
    per_batch = {"u", "delta", "B", "C", "z", "x", "hold"}
    one = {k: x[1:2] if k in per_batch and x is not None else x for k, x in inputs.items()}
    torch.testing.assert_close(call_public(op, one)[0], y[1:2], rtol=0, atol=0 if fast_backend == "c" else 1e-5)


def test_several_python_threads_at_once(backend):
    """Serving and data loading call from many threads: no shared scratch memory, no lost result."""
    cases = [(op, MAKERS[op](**(SMALL if backend == "reference" else LARGE)[op], seed=i)) for i in range(3)
             for op in OPERATORS]  # fmt: skip
    want = [results_and_gradients(call_public, op, inputs) for op, inputs in cases]
    wrong: list[str] = []

    def work(offset):
        try:
            for i in range(len(cases)):
                op, inputs = cases[(i + offset) % len(cases)]
                found = results_and_gradients(call_public, op, inputs)
                for name, x in want[(i + offset) % len(cases)].items():
                    if not torch.allclose(found[name], x, rtol=1e-4, atol=1e-4):
                        wrong.append(f"{op} {name}")
        except Exception as error:
            wrong.append(repr(error))

    workers = [threading.Thread(target=work, args=(3 * i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong, wrong[:3]


def _scan_in_child(connection, inputs, count):
    torch.set_num_threads(count)
    connection.send(ops.directional_scan(**inputs).numpy())


def test_a_forked_child_can_scan(threads, fast_backend):
    """The parent's threads do not exist in the child, and its locks may be held for ever: nothing may wait for them."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    # torch's own threads do not survive a fork, which is torch's affair.
    count = 2 if fast_backend == "c" else 1
    threads(count)
    inputs = MAKERS["directional_scan"](20, 20, channels=35, states=2)
    want = ops.directional_scan(**inputs)
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        mine, theirs = context.Pipe()
        child = context.Process(target=_scan_in_child, args=(theirs, inputs, count))
        child.start()
        try:
            assert mine.poll(60), "the child hangs"
            assert torch.equal(torch.from_numpy(mine.recv()), want)
            child.join(60)
            assert child.exitcode == 0
        finally:
            child.kill()
    assert torch.equal(ops.directional_scan(**inputs), want)  # the parent goes on as well


class Scans(torch.utils.data.Dataset):
    """A data set that scans: feature extraction in workers."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return ops.directional_scan(**MAKERS["directional_scan"](12, 12, channels=35, batch=1, seed=i))[0]


def test_data_loader_workers_can_scan(threads):
    threads(2)
    want = torch.stack([Scans()[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(Scans(), batch_size=2, num_workers=2, timeout=120)
    torch.testing.assert_close(torch.cat(list(loader)), want)


# ---- memory layouts ----


def same_values(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x in another memory layout."""
    if layout == "channels first":  # permuted
        return x.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == "slice":  # of a wider tensor, as torch.split leaves it
        wide = torch.cat([x + 1, x, x - 1], -1)
        return wide[..., x.shape[-1] : 2 * x.shape[-1]]
    if layout == "crop":  # of a larger map
        big = x.new_full((x.shape[0] + 2, *(s + 3 for s in x.shape[1:])), 9.0)
        window = big[1:-1]
        for dim in range(1, x.dim()):
            window = window.narrow(dim, 2, x.shape[dim])
        window.copy_(x)
        return window
    if layout == "reversed batch order":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    raise ValueError(layout)


@pytest.mark.parametrize("layout", ["channels first", "slice", "crop", "reversed batch order"])
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("wide", [True, False])
def test_any_memory_layout(op, layout, wide, fast_backend):
    # Maps one pixel wide or high have strides that mean nothing, which kernels like to trip over.
    shape = dict(SMALL[op])
    if not wide:
        shape |= {"width": 1} if op == "directional_scan" else {"length": 1}
    inputs = MAKERS[op](**shape)
    want = results_and_gradients(call_public, op, inputs)
    moved = {
        k: same_values(x, layout) if isinstance(x, torch.Tensor) and x.dim() > 1 and x.is_floating_point() else x
        for k, x in inputs.items()
    }
    grads = [same_values(g, layout) for g in output_grads(call_public(op, inputs))]
    found = results_and_gradients(call_public, op, moved, grads)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPERATORS)
def test_tensors_at_odd_addresses(op, dtype, fast_backend, monkeypatch):
    """What a kernel in C must not read is copied first: operands, mask and gradients; also slices of such a tensor."""
    inputs = MAKERS[op](**SMALL[op], dtype=dtype)
    grads = output_grads(call_public(op, inputs))
    want = results_and_gradients(call_public, op, inputs, grads)
    odd = {k: at_odd_address(x) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    if op == "directional_scan":
        odd["u"] = at_odd_address(torch.cat([inputs["u"]] * 2, -1))[..., : inputs["u"].shape[-1]]
    if fast_backend == "c":
        refuse_odd_addresses(monkeypatch)
    found = results_and_gradients(call_public, op, odd, [at_odd_address(g) for g in grads])
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def refuse_odd_addresses(monkeypatch):
    """Have the C backend fail where it hands on an address that is no multiple of 2, or of 4 for float32 tensors."""
    run = c_backend._call

    def checked(function, args, *rest):
        narrow = getattr(args, "dtype", 0) != 0
        for name, _ in args._fields_:
            value = getattr(args, name)
            address = value.data if isinstance(value, c_backend.View) else value
            is_address = isinstance(value, c_backend.View) or dict(args._fields_)[name] is c_backend.ptr
            if is_address and name != "hold":
                assert (address or 0) % (2 if narrow else 4) == 0, name
        run(function, args, *rest)

    monkeypatch.setattr(c_backend, "_call", checked)


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (1, 1)])
def test_strides_of_size_one_dimensions_mean_nothing(shape, fast_backend):
    inputs = MAKERS["directional_scan"](*shape, channels=16, states=2, hold=True)
    want = ops.directional_scan(**inputs)

    def odd(x):
        strides = [99 if size == 1 else stride for size, stride in zip(x.shape, x.stride())]
        return torch.as_strided(x, x.shape, strides)

    odder = {k: odd(x) if k in ("u", "delta", "B", "C", "hold") else x for k, x in inputs.items()}
    assert torch.equal(ops.directional_scan(**odder), want)


def test_expanded_inputs(fast_backend):
    """One step size for all channels, one projection for all images: stride 0, and gradients that sum."""
    inputs = MAKERS["directional_scan"](4, 5, channels=18)
    small = {"delta": inputs["delta"][..., :1].clone(), "B": inputs["B"][:1].clone(), "D": inputs["D"][:1].clone()}

    def expanded(op, leaves):
        return call_public(op, leaves | {k: leaves[k].expand_as(inputs[k]) for k in small})

    def definition(op, leaves):
        return call_reference(op, leaves | {k: leaves[k].expand_as(inputs[k]) for k in small})

    found = results_and_gradients(expanded, "directional_scan", inputs | small)
    want = results_and_gradients(definition, "directional_scan", inputs | small)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("op", OPERATORS)
def test_expanded_gradients(op, fast_backend):
    """y.sum() sends back one number, expanded to all of y."""
    inputs = MAKERS[op](**SMALL[op])
    ones = lambda call: [torch.ones_like(y) for y in call(op, inputs)]  # noqa: E731
    expanded = [torch.ones(()).expand_as(y) for y in call_public(op, inputs)]
    want = results_and_gradients(call_public, op, inputs, ones(call_public))
    found = results_and_gradients(call_public, op, inputs, expanded)
    for name in want:
        torch.testing.assert_close(found[name], want[name])


@pytest.mark.parametrize("op", OPERATORS)
def test_inputs_are_left_alone(op, fast_backend):
    inputs = MAKERS[op](**SMALL[op])
    before = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    results_and_gradients(call_public, op, inputs)
    for name, x in before.items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(inputs[name], x), name
