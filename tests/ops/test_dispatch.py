"""Which backend runs: the report, the environment variable, and a machine without the C kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from scan_cases import MAKERS, assert_close_to_truth

from ssmamba_models import backends, ops
from ssmamba_models.notice import SSMambaWarning
from ssmamba_models.ops import dispatch
from ssmamba_models.ops.cpu import library

OPERATORS = ("directional_scan", "selective_scan", "causal_conv1d")
SMALL = {
    "directional_scan": {"height": 3, "width": 4, "channels": 6},
    "selective_scan": {"length": 5, "channels": 6},
    "causal_conv1d": {"length": 5, "channels": 6},
}


@pytest.fixture
def no_kernels(monkeypatch, without_memory):
    """A machine on which the C kernels were never built."""
    monkeypatch.delenv("SSMAMBA_BACKEND", raising=False)
    monkeypatch.setattr(library, "open_library", lambda: (None, "they were not built"))
    return without_memory


def test_the_report_is_complete_and_plain():
    report = backends()
    assert json.loads(json.dumps(report)) == report
    assert {"c", "torch", "reference"} <= report["backends"].keys()
    for entry in report["backends"].values():
        assert entry.keys() == {"available", "devices", "reason", "cure"}
        assert entry["available"] == (entry["reason"] == "")
    assert report["backends"]["torch"]["available"]
    assert report["backends"]["torch"]["devices"] == ["any"]
    assert report["backends"]["reference"]["available"]
    assert report["backends"]["c"]["devices"] == ["cpu"]
    assert set(report["operators"]) == set(OPERATORS)
    for devices in report["operators"].values():
        assert devices["cpu"] == ("c" if report["backends"]["c"]["available"] else "torch")


def test_the_package_and_ops_offer_the_same_report():
    assert backends is ops.backends


@pytest.mark.parametrize("name", ["c", "torch", "reference", " Torch "])
def test_the_report_says_what_is_forced(name, monkeypatch):
    monkeypatch.setenv("SSMAMBA_BACKEND", name)
    report = backends()
    forced = name.strip().lower()
    assert report["forced"] == forced
    if report["backends"][forced]["available"]:
        assert {devices["cpu"] for devices in report["operators"].values()} == {forced}


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_forces_nothing(value, monkeypatch):
    monkeypatch.setenv("SSMAMBA_BACKEND", value)
    assert backends()["forced"] is None


@pytest.mark.parametrize("op", OPERATORS)
def test_an_unknown_backend_is_an_error(op, monkeypatch):
    monkeypatch.setenv("SSMAMBA_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"SSMAMBA_BACKEND='fastest' names no backend: use one of .*torch"):
        getattr(ops, op)(**MAKERS[op](**SMALL[op]))
    with pytest.raises(ValueError, match="fastest"):
        backends()


@pytest.mark.parametrize("op", OPERATORS)
def test_the_c_kernels_forced_on_float64_are_an_error(op, monkeypatch):
    """Never a silent fall-back: whoever forces a backend wants to know."""
    if not backends()["backends"]["c"]["available"]:
        pytest.skip("the C kernels are not built here")
    monkeypatch.setenv("SSMAMBA_BACKEND", "c")
    with pytest.raises(ValueError, match=f"SSMAMBA_BACKEND=c cannot run {op} here: .*not float64"):
        getattr(ops, op)(**MAKERS[op](**SMALL[op], dtype=torch.float64))


@pytest.mark.parametrize("op", OPERATORS)
def test_the_forced_backend_is_the_one_that_runs(op, backend, monkeypatch):
    module = dispatch.BACKENDS[backend].load()
    calls = []
    original = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *args: calls.append(backend) or original(*args))
    getattr(ops, op)(**MAKERS[op](**SMALL[op]))
    assert calls == [backend]


def test_without_kernels_torch_computes_and_says_so_once(no_kernels):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for op in OPERATORS:
                for dtype in (torch.float32, torch.bfloat16):
                    assert_close_to_truth(op, MAKERS[op](**SMALL[op], dtype=dtype))
    ours = [str(w.message) for w in caught if "ssmamba_models" in str(w.message)]
    assert len(ours) == 1, ours
    assert "'c'" in ours[0]
    assert "they were not built" in ours[0]
    assert "install a C compiler" in ours[0]
    assert "ssmamba doctor" in ours[0]


def test_each_gpu_of_a_machine_is_asked(monkeypatch, without_memory):
    """Beside a GPU that triton supports there may be one that it does not."""
    from ssmamba_models.ops.triton import backend as triton_backend

    pytest.importorskip("triton")
    monkeypatch.delenv("SSMAMBA_BACKEND", raising=False)
    capability = {"cuda:0": (9, 0), "cuda:1": (6, 1)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[str(device)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(triton_backend.shutil, "which", lambda name: name)
    on = lambda i: SimpleNamespace(device=torch.device("cuda", i), dtype=torch.float32)  # noqa: E731
    for order in ((0, 1), (1, 0)):
        dispatch._missing.cache_clear()
        dispatch._choose.cache_clear()
        dispatch._said.clear()
        dispatch._warn_of_missing.cache_clear()
        for i in order:
            if i == 0:
                assert dispatch.select("selective_scan", on(0)) is triton_backend
            else:
                with pytest.warns(SSMambaWarning, match=r"cuda:1 .*GPU 1 is older than triton supports"):
                    assert dispatch.select("selective_scan", on(1)) is not triton_backend


def test_without_kernels_the_report_names_reason_and_cure(no_kernels):
    report = backends()
    assert report["backends"]["c"] == {
        "available": False, "devices": ["cpu"], "reason": "they were not built", "cure": library.CURE,
    }  # fmt: skip
    assert {devices["cpu"] for devices in report["operators"].values()} == {"torch"}


def test_without_kernels_forcing_them_is_an_error_with_the_cure(no_kernels, monkeypatch):
    monkeypatch.setenv("SSMAMBA_BACKEND", "c")
    with pytest.raises(ValueError, match=r"they were not built.*install a C compiler"):
        ops.causal_conv1d(**MAKERS["causal_conv1d"](length=5))


def test_forcing_torch_warns_of_nothing(no_kernels, monkeypatch):
    monkeypatch.setenv("SSMAMBA_BACKEND", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close_to_truth("causal_conv1d", MAKERS["causal_conv1d"](length=5))


def test_float64_warns_of_nothing(without_memory, monkeypatch):
    """The C kernels are there, they just do not compute float64: nothing to mend."""
    monkeypatch.delenv("SSMAMBA_BACKEND", raising=False)
    if not backends()["backends"]["c"]["available"]:
        pytest.skip("the C kernels are not built here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = MAKERS["causal_conv1d"](length=5, dtype=torch.float64)
        assert_close_to_truth("causal_conv1d", inputs)
    assert dispatch.select("causal_conv1d", inputs["x"]) is dispatch.BACKENDS["torch"].load()


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_kernels_that_cannot_be_loaded_are_missing(content, tmp_path, monkeypatch, without_memory):
    """A truncated or foreign file: reported with the loader's words, never a crash."""
    broken = tmp_path / "_kernels.abi3.so"
    broken.write_bytes(content)
    spec = type("Spec", (), {"origin": str(broken)})
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: spec)
    library.open_library.cache_clear()
    try:
        handle, reason = library.open_library()
    finally:
        library.open_library.cache_clear()
    assert handle is None
    assert "could not be loaded" in reason


def test_the_variable_is_read_at_every_call(monkeypatch):
    """Changing it in a running process takes effect: notebooks do that."""
    inputs = MAKERS["causal_conv1d"](length=5)
    monkeypatch.setenv("SSMAMBA_BACKEND", "torch")
    ops.causal_conv1d(**inputs)
    monkeypatch.setenv("SSMAMBA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        ops.causal_conv1d(**inputs)


@pytest.mark.slow
def test_the_variable_reaches_a_fresh_process():
    code = "import ssmamba_models; print(ssmamba_models.backends()['operators']['directional_scan']['cpu'])"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"SSMAMBA_BACKEND": "reference"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == ["reference"]
