"""Fixtures of the operators' tests: backends by environment variable, and a dispatch without memory."""

from __future__ import annotations

import pytest
import torch
from scan_cases import BACKENDS

from ssmamba_models.ops import dispatch


def forget_choices() -> None:
    """Empty what dispatch remembers: choices, missing backends, and the warnings that it has given."""
    for function in (dispatch._choose, dispatch._missing, dispatch._warn_of_missing):
        function.cache_clear()
    dispatch._said.clear()


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """Each backend in turn, forced."""
    if request.param == "c" and not dispatch.backends()["backends"]["c"]["available"]:
        pytest.skip("the C kernels are not built here")
    monkeypatch.setenv("SSMAMBA_BACKEND", request.param)
    return request.param


@pytest.fixture
def fast_backend(backend) -> str:
    """The backends that users run: the definition is too slow for long sequences."""
    if backend == "reference":
        pytest.skip("the definition itself")
    return backend


@pytest.fixture
def without_memory():
    """Dispatch as in a fresh process, before and after."""
    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
