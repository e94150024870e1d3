"""What needs a CUDA or ROCm device: skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssmamba_models.ops import dispatch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="needs a CUDA or ROCm device, torch sees none")
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def _require(name: str) -> None:
    reason, cure = dispatch.BACKENDS[name].why_missing()
    if reason:
        pytest.skip(f"backend {name!r} is missing: {reason}; {cure}")


@pytest.fixture
def triton_backend(monkeypatch):
    """Forces our kernels, so that no test passes on another backend unnoticed."""
    _require("triton")
    monkeypatch.setenv(dispatch.VARIABLE, "triton")


@pytest.fixture
def cuda_backend(monkeypatch):
    """Forces mamba-ssm's and causal-conv1d's kernels."""
    _require("cuda")
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
