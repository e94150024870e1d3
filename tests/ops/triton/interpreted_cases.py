"""Triton kernels in triton's interpreter, against the definitions in float64: run by test_interpreter.py.

Not collected by itself: TRITON_INTERPRET=1 must be set before the kernels are decorated. Shapes are small, because a
program takes milliseconds, and awkward, because a mistake hides in the common ones.
"""

from __future__ import annotations

import pytest
import torch

from ssmamba_models.ops import naive
from ssmamba_models.ops.triton import backend

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
NAMES = {
    "directional_scan": ("u", "delta", "A", "B", "C", "D", "delta_bias"),
    "selective_scan": ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
    "causal_conv1d": ("x", "weight", "bias"),
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def expect_close(name, got, want, tolerance):
    if want.numel() == 0:
        return
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
    assert got.shape == want.shape, name
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def check(op, args, grads):
    """Compare an operator and its backward with the definition; returns what the kernels gave."""
    dtype = args[0].dtype
    out = getattr(backend, op)(*args)
    want = getattr(naive, op)(*map(wide, args))
    for i, (x, y) in enumerate(zip(*((r if isinstance(r, tuple) else (r,)) for r in (out, want)))):
        expect_close(f"output {i}", x, y, TOLERANCE[dtype])
    back = getattr(backend, f"{op}_backward")(*grads, *args)
    want = getattr(naive, f"{op}_backward")(*map(wide, grads), *map(wide, args))
    for name, x, y in zip(NAMES[op], back, want):
        expect_close(f"gradient of {name}", x, y, TOLERANCE[dtype])
    return out, back


def directional(batch, height, width, channels, states, dtype=torch.float32, hold=False, skip=True, bias=True):
    shape = (batch, height, width)
    args = (
        normal(*shape, channels, dtype=dtype),
        normal(*shape, channels, dtype=dtype),
        -torch.rand(4, channels, states) * 2 - 0.1,
        normal(*shape, 4, states, dtype=dtype),
        normal(*shape, 4, states, dtype=dtype),
        normal(channels) if skip else None,
        normal(4, channels) if bias else None,
        torch.rand(shape) < 0.4 if hold else None,
    )
    return args, (normal(*shape, channels, dtype=dtype),)


@pytest.mark.parametrize(
    "case",
    [
        {"height": 1, "width": 1, "channels": 3, "states": 1},
        {"height": 1, "width": 2, "channels": 1, "states": 2, "skip": False, "bias": False},
        {"height": 3, "width": 5, "channels": 17, "states": 1, "hold": True},
        {"height": 9, "width": 2, "channels": 5, "states": 1},
        {"height": 2, "width": 31, "channels": 4, "states": 1, "hold": True},
        {"height": 2, "width": 3, "channels": 5, "states": 8},
        {"height": 1, "width": 3, "channels": 18, "states": 16, "hold": True},
        {"height": 4, "width": 3, "channels": 6, "states": 2, "dtype": torch.bfloat16},
        {"height": 3, "width": 4, "channels": 6, "states": 1, "dtype": torch.float16, "hold": True},
    ],
    ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()),
)
def test_directional_scan(case):
    check("directional_scan", *directional(batch=1, **case))


def test_directional_scan_more_than_one_image_and_tile():
    check("directional_scan", *directional(2, 17, 9, 4, 1, hold=True))


def test_directional_scan_of_views():
    """Slices of a wider projection, as the model makes them, and a gradient that is expanded."""
    (u, delta, A, B, C, D, bias, _), _ = directional(2, 3, 4, 5, 2)
    both = torch.cat([u, delta], -1)
    projected = torch.cat([B.flatten(3), C.flatten(3)], -1)
    B, C = (x.unflatten(-1, (4, 2)) for x in projected.chunk(2, -1))
    hold = torch.rand(4, 3, 2).permute(2, 1, 0) < 0.3
    grad = torch.randn(1, 1, 1, 5).expand(2, 3, 4, 5)
    check("directional_scan", (both[..., :5], both[..., 5:], A, B, C, D, bias, hold), (grad,))


def test_directional_scan_is_stable_for_large_steps():
    args, grads = directional(1, 3, 4, 3, 2)
    delta = args[1] * 30
    check("directional_scan", (args[0], delta, args[2] * 8, *args[3:]), grads)


def test_directional_scan_twice_is_the_same_to_the_bit():
    args, grads = directional(1, 3, 4, 5, 1, hold=True)
    runs = []
    for _ in range(2):
        runs.append((backend.directional_scan(*args), *backend.directional_scan_backward(*grads, *args)))
    assert all(torch.equal(x, y) for x, y in zip(*runs))


def selective(
    batch, channels, length, states, groups, dtype=torch.float32, gate=True, softplus=True, state=True, optional=True
):
    long = (batch, channels, length)
    args = (
        normal(*long, dtype=dtype),
        (normal(*long) if softplus else torch.rand(long)).to(dtype),
        -torch.rand(channels, states) * 2 - 0.1,
        normal(batch, groups, states, length, dtype=dtype),
        normal(batch, groups, states, length, dtype=dtype),
        normal(channels) if optional else None,
        normal(*long, dtype=dtype) if gate else None,
        torch.rand(channels) if optional else None,
        softplus,
    )
    return args, (normal(*long, dtype=dtype), normal(batch, channels, states) if state else None)


@pytest.mark.parametrize(
    "case",
    [
        {"channels": 1, "length": 1, "states": 1, "groups": 1},
        {"channels": 6, "length": 2, "states": 2, "groups": 2, "gate": False, "softplus": False, "optional": False},
        {"channels": 6, "length": 3, "states": 8, "groups": 3, "state": False},
        {"channels": 20, "length": 31, "states": 1, "groups": 1},
        {"channels": 5, "length": 33, "states": 2, "groups": 1, "softplus": False},
        {"channels": 3, "length": 4, "states": 16, "groups": 1, "gate": False},
        {"channels": 4, "length": 20, "states": 2, "groups": 2, "dtype": torch.bfloat16},
        {"channels": 4, "length": 5, "states": 1, "groups": 1, "dtype": torch.float16},
    ],
    ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()),
)
def test_selective_scan(case):
    check("selective_scan", *selective(batch=2, **case))


def test_selective_scan_of_views():
    """x and z as two halves of one projection, B the same at all times."""
    (u, delta, A, B, C, D, z, bias, softplus), grads = selective(2, 4, 9, 3, 1)
    halves = torch.cat([u, z], 1)
    B = B[:, :, :, :1].expand(-1, -1, -1, 9)
    check("selective_scan", (halves[:, :4], delta, A, B, C, D, halves[:, 4:], bias, softplus), grads)


def test_selective_scan_twice_is_the_same_to_the_bit():
    args, grads = selective(1, 3, 18, 2, 1)
    runs = [(*backend.selective_scan(*args), *backend.selective_scan_backward(*grads, *args)) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs))


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("length", [1, 3, 33])
def test_causal_conv1d(taps, silu, length):
    args = (normal(2, 5, length), normal(5, taps), normal(5) if silu else None, silu)
    check("causal_conv1d", args, (normal(2, 5, length),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_causal_conv1d_in_16_bits(dtype):
    args = (normal(1, 3, 20, dtype=dtype), normal(3, 4), normal(3), True)
    check("causal_conv1d", args, (normal(1, 3, 20, dtype=dtype),))


def test_causal_conv1d_of_a_view_and_several_tiles():
    x = normal(1, 300, 6).transpose(1, 2)[:, 1:4]
    out, _ = check("causal_conv1d", (x, normal(3, 4), normal(3), True), (normal(1, 3, 300),))
    assert out.is_contiguous()


def spread(x, step):
    """x with steps (the last dimension) so many elements apart: 8 GiB of addresses, of which few pages are touched."""
    room = torch.empty(step * (x.shape[-1] - 1) + x[..., 0].numel(), dtype=x.dtype)
    strides = (*torch.empty(x.shape[:-1]).stride(), step)
    return room.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("name", ["u", "z", "B"])
def test_selective_scan_beyond_31_bits(name):
    args, grads = selective(1, 2, 3, 2, 2)
    at = {"u": 0, "z": 6, "B": 3}[name]
    far = list(args)
    far[at] = spread(args[at], 2**30 + 3)
    if name == "B":
        far[4] = spread(args[4], 2**30 + 3)
    for function, head in ((backend.selective_scan, ()), (backend.selective_scan_backward, grads)):
        for x, want in zip(function(*head, *far), function(*head, *args)):
            assert torch.equal(x, want)
