"""mamba-ssm's and causal-conv1d's real kernels through our operators, where they are installed."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import FUNCTIONS, TOLERANCE, conv, directional, expect_close, run, selective, truth

from ssmamba_models.ops import cuda

pytestmark = pytest.mark.usefixtures("cuda_backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def require(op, dtype):
    reason = cuda.unsupported(op, dtype, 1)
    if reason:
        pytest.skip(reason)


def compare(op, inputs, monkeypatch):
    dtype = next(iter(inputs.values())).dtype
    require(op, dtype)
    # Their bf16 sums of four directions are rounded once more each than ours.
    expect_close(run(FUNCTIONS[op], inputs), truth(op, inputs, monkeypatch), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 33, 196, 3136])
@pytest.mark.parametrize("gate", [False, True])
def test_selective_scan(monkeypatch, dtype, length, gate):
    compare("selective_scan", selective(length, dtype=dtype, gate=gate, return_last_state=False), monkeypatch)


def test_last_state(monkeypatch):
    compare("selective_scan", selective(50), monkeypatch)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_directional_scan(monkeypatch, dtype, hold):
    compare("directional_scan", directional(9, 14, dtype=dtype, hold=hold), monkeypatch)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_conv1d(monkeypatch, dtype, taps):
    compare("causal_conv1d", conv(300, channels=24, taps=taps, dtype=dtype), monkeypatch)
