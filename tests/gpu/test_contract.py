"""What training and serving ask of the kernels on a device: the same bits twice, compile, autocast, graphs, memory."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from gpu_cases import DEVICE, FUNCTIONS, SMALL, directional, expect_close, leaves, outputs, run
from torch.utils.checkpoint import checkpoint

from ssmamba_models import ops
from ssmamba_models.ops import dispatch

pytestmark = pytest.mark.usefixtures("triton_backend")
OPERATORS = list(FUNCTIONS)


@pytest.mark.parametrize("op", OPERATORS)
def test_two_runs_agree_to_the_bit(op):
    inputs = SMALL[op](batch=16)
    first, second = run(FUNCTIONS[op], inputs), run(FUNCTIONS[op], inputs)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("op", OPERATORS)
def test_compile_without_graph_breaks(op):
    inputs = SMALL[op]()
    compiled = torch.compile(FUNCTIONS[op], fullgraph=True)
    expect_close(run(compiled, inputs), run(FUNCTIONS[op], inputs), 1e-6)


@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op):
    inputs = leaves(SMALL[op]())
    if op == "causal_conv1d":
        inputs["activation"] = True
    inputs.pop("return_last_state", None)
    torch.library.opcheck(getattr(torch.ops.ssmamba, op).default, tuple(inputs.values()))


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_activations_alone(op, dtype):
    inputs = leaves(SMALL[op]())
    with torch.autocast(DEVICE, dtype):
        result = outputs(FUNCTIONS[op](**inputs))
    assert result[0].dtype == dtype
    assert all(r.dtype == torch.float32 for r in result[1:])
    result[0].float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs.values() if torch.is_tensor(x) and x.requires_grad)


@pytest.mark.parametrize("op", OPERATORS)
def test_cuda_graph_replays_forward_and_backward(op):
    inputs = leaves(SMALL[op]())
    tensors = [x for x in inputs.values() if torch.is_tensor(x) and x.requires_grad]

    def step():
        result = outputs(FUNCTIONS[op](**inputs))
        return (*result, *torch.autograd.grad(sum(r.sum() for r in result), tensors))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles the kernels, which a capture cannot
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in tensors:
            x.mul_(0.5)
    graph.replay()
    for x, y in zip(captured, step()):
        assert torch.equal(x, y)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(op, reentrant):
    inputs = SMALL[op]()
    names, plain = list(inputs), FUNCTIONS[op]

    def recomputed(**given):
        function = lambda *values: plain(**dict(zip(names, values)))  # noqa: E731
        return checkpoint(function, *given.values(), use_reentrant=reentrant)

    expect_close(run(recomputed, inputs), run(plain, inputs), 0.0)


def test_a_stream_of_ones_own():
    inputs = SMALL["directional_scan"]()
    want = ops.directional_scan(**inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = ops.directional_scan(**inputs)
    stream.synchronize()
    assert torch.equal(got, want)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = SMALL["directional_scan"]()
    there = {k: x.to("cuda:1") if torch.is_tensor(x) else x for k, x in inputs.items()}
    assert torch.equal(ops.directional_scan(**there).cpu(), ops.directional_scan(**inputs).cpu())
    with pytest.raises(ValueError, match="move them to one device"):
        ops.directional_scan(**{**inputs, "delta": there["delta"]})


def test_memory_is_linear_in_the_length():
    """Four times the pixels, about four times the memory of a training step, and no state per pixel."""
    peaks = []
    for side in (64, 128):
        inputs = leaves(directional(side, side, 32, 16, batch=4, dtype=torch.bfloat16))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.directional_scan(**inputs).float().sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        states = 4 * side * side * 32 * 16 * 4 * 4  # one float32 per image, pixel, channel, state and direction
        assert peaks[-1] < states
    assert peaks[1] < 4.5 * peaks[0]


def test_tensors_on_different_devices():
    inputs = SMALL["selective_scan"]()
    with pytest.raises(ValueError, match="move them to one device"):
        ops.selective_scan(**{**inputs, "A": inputs["A"].cpu()})


def test_float64_and_too_many_states_are_refused_when_forced():
    inputs = {k: x.double() if torch.is_tensor(x) else x for k, x in SMALL["causal_conv1d"]().items()}
    with pytest.raises(ValueError, match=r"SSMAMBA_BACKEND=triton cannot run causal_conv1d here: .*float64"):
        ops.causal_conv1d(**inputs)
    with pytest.raises(ValueError, match="up to 256 states, not 257"):
        ops.directional_scan(**directional(1, 1, 1, 257))


def test_the_report_names_triton(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE)
    report = ops.backends()
    assert report["backends"]["triton"]["available"]
    assert all(devices["cuda"] == "triton" for devices in report["operators"].values())


SANITIZED = """
import torch
from gpu_cases import FUNCTIONS, SMALL, run
for op in FUNCTIONS:
    run(FUNCTIONS[op], SMALL[op]())
torch.cuda.synchronize()
"""


@pytest.mark.slow
def test_no_access_outside_the_tensors_under_compute_sanitizer(request, monkeypatch):
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    # One cudaMalloc per tensor, so that the tool sees where each ends.
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, cwd=request.path.parent, capture_output=True, text=True, timeout=1200, check=False)
    if "not supported" in done.stdout:
        pytest.skip(f"compute-sanitizer does not work on this machine: {done.stdout[-300:]}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
