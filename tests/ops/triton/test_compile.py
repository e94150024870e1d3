"""Every kernel compiled ahead of time, without a GPU: what the interpreter lets through, a compiler may not.

The operators run as they are; in place of a launch, the kernel is compiled for the arguments that it would get.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from scan_cases import MAKERS, at_odd_address

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
    pytest.skip(f"triton {triton.__version__} takes its compiler's input in another form", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from ssmamba_models.ops.triton import backend, convolution, directional, launch, selective  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCAN_KERNELS = {"summary_kernel", "carry_kernel", "output_kernel", "backward_summary_kernel", "gradient_kernel"}
CONV_KERNELS = {"conv_kernel", "conv_backward_kernel"}


def source_of(kernel, arguments, constants):
    """What triton's launcher would hand its compiler: types, constants (None and 1 too) and alignments."""
    values = {**arguments, **constants}
    assert set(values) == set(kernel.arg_names)
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], fixed[(i,)] = "constexpr", value
            continue
        signature[name] = TYPES[value.dtype] if torch.is_tensor(value) else "i32" if value < 2**31 else "i64"
        if torch.is_tensor(value) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, attributes)


class Compiler:
    """Stands in for `launch`; keeps what it compiled."""

    def __init__(self, target):
        self.target = target
        self.compiled = {}

    def __call__(self, kernel, programs, arguments, constants, warps=launch.WARPS):
        options = {"num_warps": warps, "num_stages": 1}
        source = source_of(kernel, arguments, constants)
        self.compiled[kernel.__name__] = triton.compile(source, target=self.target, options=options)


@contextlib.contextmanager
def compiling(monkeypatch, target):
    compiler = Compiler(TARGETS[target])
    for module in (launch, convolution):
        monkeypatch.setattr(module, "launch", compiler)
    yield compiler.compiled


def expect_sane(compiled, names, target):
    assert set(compiled) == names
    for name, kernel in compiled.items():
        assert kernel.asm["cubin" if target.startswith("sm") else "hsaco"], name
        # 48 KiB is what every GPU gives a block without asking.
        assert kernel.metadata.shared <= 48 * 1024, f"{name} wants {kernel.metadata.shared} bytes of shared memory"


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype)


def run_directional(dtype, height=3, width=3, channels=32, states=1, hold=True, batch=2):
    shape = (batch, height, width)
    args = (
        empty(*shape, channels, dtype=dtype),
        empty(*shape, channels, dtype=dtype),
        empty(4, channels, states),
        empty(*shape, 4, states, dtype=dtype),
        empty(*shape, 4, states, dtype=dtype),
        empty(channels),
        empty(4, channels),
        torch.zeros(shape, dtype=torch.bool) if hold else None,
    )
    directional.directional_scan(*args)
    directional.directional_scan_backward(args[0], *args)


def run_selective(dtype, length, states, groups=1, channels=16, batch=2):
    long = (batch, channels, length)
    u = empty(*long, dtype=dtype)
    B = empty(batch, groups, states, length, dtype=dtype)
    args = (u, u, empty(channels, states), B, B, empty(channels), u, empty(channels), True)
    selective.selective_scan(*args)
    selective.selective_scan_backward(u, empty(batch, channels, states), *args)


def run_conv(dtype, taps, silu):
    args = (empty(2, 6, 40, dtype=dtype), empty(6, taps), empty(6), silu)
    convolution.causal_conv1d(*args)
    convolution.causal_conv1d_backward(args[0], *args)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_for_every_dtype(monkeypatch, target, dtype):
    with compiling(monkeypatch, target) as compiled:
        run_directional(dtype)
        run_conv(dtype, 4, True)
    expect_sane(compiled, SCAN_KERNELS | CONV_KERNELS, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_scan_along_time(monkeypatch, target):
    """Steps that lie side by side, ragged chunks, a gate, a state's gradient."""
    with compiling(monkeypatch, target) as compiled:
        run_selective(torch.bfloat16, length=19, states=4, groups=2)
    expect_sane(compiled, SCAN_KERNELS, target)


def test_sizes_of_one(monkeypatch):
    """Triton turns every argument that is 1 into a constant, which not all of its functions take."""
    with compiling(monkeypatch, "sm_90") as compiled:
        run_directional(torch.float32, 1, 1, 1, batch=1)
        run_selective(torch.float32, length=1, states=1, channels=1, batch=1)
        convolution.causal_conv1d(empty(1, 1, 1), empty(1, 2), None, False)
    expect_sane(compiled, SCAN_KERNELS | {"conv_kernel"}, "sm_90")


def test_offsets_beyond_31_bits(monkeypatch):
    constants = launch.Scan.constants
    monkeypatch.setattr(launch.Scan, "constants", lambda *args: {**constants(*args), "WIDE": True})
    with compiling(monkeypatch, "sm_90") as compiled:
        run_directional(torch.bfloat16, 2, 2, 16)
    expect_sane(compiled, SCAN_KERNELS, "sm_90")


@pytest.mark.parametrize("taps", [2, 3])
def test_shorter_convolutions(monkeypatch, taps):
    with compiling(monkeypatch, "sm_90") as compiled:
        run_conv(torch.bfloat16, taps, False)
    expect_sane(compiled, CONV_KERNELS, "sm_90")


@pytest.mark.slow
def test_first_stage_of_the_encoder_does_not_spill(monkeypatch):
    """(56, 56, 32) in bfloat16, N = 1, the largest map: everything must stay in registers."""
    with compiling(monkeypatch, "sm_90") as compiled:
        run_directional(torch.bfloat16, 56, 56, 32, hold=False)
    expect_sane(compiled, SCAN_KERNELS, "sm_90")
    for name, kernel in compiled.items():
        assert ".local" not in kernel.asm["ptx"], f"{name} has arrays in local memory"
        assert kernel.metadata.shared <= 2048, name


def test_images_beyond_31_bits_use_long_offsets(monkeypatch):
    seen = []
    record = lambda kernel, programs, arguments, constants, warps=4: seen.append(constants)  # noqa: E731
    monkeypatch.setattr(launch, "launch", record)
    x = torch.empty(1, device="meta").expand(1, 50000, 1500, 32)
    B = torch.empty(1, device="meta").expand(1, 50000, 1500, 4, 1)
    directional.directional_scan(
        x.contiguous(), x.contiguous(), torch.empty(4, 32, 1, device="meta"), B, B, None, None, None
    )
    assert seen
    assert all(constants["WIDE"] for constants in seen[:2] + seen[-2:])


@pytest.mark.parametrize("op", ["directional_scan", "selective_scan", "causal_conv1d"])
def test_kernels_see_no_odd_addresses(op, monkeypatch):
    """A GPU faults where it reads them. Kernels that are recorded write nothing; their results are not looked at."""
    seen = []
    record = lambda kernel, programs, arguments, constants, warps=4: seen.append(arguments)  # noqa: E731
    for module in (launch, convolution):
        monkeypatch.setattr(module, "launch", record)
    sizes = {"height": 2, "width": 3, "hold": True} if op == "directional_scan" else {"length": 3}
    inputs = MAKERS[op](**sizes, **{"groups": 1} if op == "selective_scan" else {})
    if op == "causal_conv1d":
        inputs["activation"] = True
    odd = [at_odd_address(x) if isinstance(x, torch.Tensor) else x for x in inputs.values()]
    grads = [at_odd_address(odd[0])] + ([at_odd_address(torch.zeros(2, 19, 1))] if op == "selective_scan" else [])
    getattr(backend, op)(*odd)
    getattr(backend, f"{op}_backward")(*grads, *odd)
    tensors = [x for arguments in seen for x in arguments.values() if isinstance(x, torch.Tensor)]
    assert tensors
    assert all(x.data_ptr() % x.element_size() == 0 for x in tensors)


def test_too_many_programs_are_refused():
    with pytest.raises(ValueError, match="split the batch"):
        launch.launch(None, 2**31, {}, {})
