"""The Triton kernels on a device against float64, for the outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import FUNCTIONS, SMALL, TOLERANCE, conv, directional, expect_close, run, selective, truth

pytestmark = pytest.mark.usefixtures("triton_backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 2, 3, 31, 32, 33, 196, 3136]
MAPS = [(1, 1), (1, 2), (3, 1), (1, 31), (4, 8), (33, 2), (14, 14), (56, 56), (28, 57)]


def compare(op, inputs, monkeypatch):
    dtype = next(iter(inputs.values())).dtype
    expect_close(run(FUNCTIONS[op], inputs), truth(op, inputs, monkeypatch), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width"), MAPS)
@pytest.mark.parametrize("hold", [False, True])
def test_directional_scan(monkeypatch, height, width, dtype, hold):
    compare("directional_scan", directional(height, width, dtype=dtype, hold=hold), monkeypatch)


@pytest.mark.parametrize("states", [1, 2, 8, 16])
@pytest.mark.parametrize("channels", [1, 5, 32, 33, 160])
def test_states_and_channels(monkeypatch, states, channels):
    compare("directional_scan", directional(7, 10, channels, states), monkeypatch)
    compare("selective_scan", selective(70, channels, states, groups=1), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gate", [False, True])
def test_selective_scan(monkeypatch, length, dtype, gate):
    compare("selective_scan", selective(length, dtype=dtype, gate=gate), monkeypatch)


@pytest.mark.parametrize("groups", [1, 3, 24])
def test_groups(monkeypatch, groups):
    compare("selective_scan", selective(50, groups=groups), monkeypatch)


def test_as_many_states_as_allowed(monkeypatch):
    compare("selective_scan", selective(40, 3, 256, 1), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_causal_conv1d(monkeypatch, length, dtype, taps):
    compare("causal_conv1d", conv(length, taps=taps, dtype=dtype), monkeypatch)


def test_non_contiguous_inputs(monkeypatch):
    inputs = directional(6, 9)
    inputs["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["B"] = inputs["B"].permute(4, 3, 0, 1, 2).contiguous().permute(2, 3, 4, 1, 0)
    compare("directional_scan", inputs, monkeypatch)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_batch_of_none(op):
    inputs = SMALL[op](batch=0)
    assert all(x.numel() == 0 or not x.any() for x in run(FUNCTIONS[op], inputs).values())


@pytest.mark.slow
def test_image_beyond_31_bits():
    """One image of 2^31 values and more: the end of the map agrees with the same rows scanned alone."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    height, width, channels = 1, 2**21 + 5, 1040
    inputs = directional(height, width, channels, batch=1, dtype=torch.bfloat16)
    inputs["delta"].fill_(8.0)  # the state forgets within a few steps, so a short tail is enough to compare
    y = FUNCTIONS["directional_scan"](**inputs)
    tail = 64
    part = {k: v[:, :, -tail:] if k in ("u", "delta", "B", "C") else v for k, v in inputs.items()}
    want = FUNCTIONS["directional_scan"](**part)
    assert torch.allclose(y[:, :, -tail // 2 :].float(), want[:, :, -tail // 2 :].float(), rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_nothing_is_read_outside_the_tensors(op, monkeypatch):
    """Inputs that lie between NaN: reading a neighbour that counts would spread them."""
    inputs = SMALL[op]()
    guarded = {}
    for name, x in inputs.items():
        if not torch.is_tensor(x) or not x.is_floating_point():
            guarded[name] = x
            continue
        room = torch.full((x.numel() + 256,), float("nan"), dtype=x.dtype, device=x.device)
        guarded[name] = room[128 : 128 + x.numel()].view(x.shape)
        guarded[name].copy_(x)
    plain, between = FUNCTIONS[op](**inputs), FUNCTIONS[op](**guarded)
    for x, y in zip(*((r if isinstance(r, tuple) else (r,)) for r in (plain, between))):
        assert torch.equal(x, y)
