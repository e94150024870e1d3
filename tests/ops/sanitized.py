"""A program that runs random shapes through kernels in a given library, and compares them with the definition.

Every other case gets its tensors at odd addresses.

Started by test_sanitizer with AddressSanitizer loaded, which ends the process at the first bad access.
"""

from __future__ import annotations

import ctypes
import random
import sys
from types import SimpleNamespace

import torch
from scan_cases import MAKERS, assert_close_to_truth, at_odd_address, call_public, output_grads, truth_of

from ssmamba_models.ops.cpu import backend, library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def take_library(path: str) -> None:
    """Have the kernels come from this file."""
    library.importlib = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: SimpleNamespace(origin=path)))
    opened, reason = library.open_library()
    assert opened is not None, reason
    assert opened._name == path


def draw(op: str, dice: random.Random) -> dict:
    """Arguments of one of the makers: sizes on both sides of what fills a vector."""
    some = {
        "channels": dice.choice([1, 3, 15, 16, 17, 31, 32, 40]),
        "batch": dice.randint(1, 3),
        "bias": dice.random() < 0.5,
    }
    if op == "causal_conv1d":
        return {**some, "length": dice.randint(1, 70), "taps": dice.randint(2, 4), "silu": dice.random() < 0.5}
    some |= {"states": dice.choice([1, 1, 2, 3, 8, 16, 17]), "skip": dice.random() < 0.5}
    if op == "directional_scan":
        return {**some, "height": dice.randint(1, 9), "width": dice.randint(1, 9), "hold": dice.random() < 0.5}
    groups = dice.choice([0, 1, some["channels"]])
    return {**some, "length": dice.randint(1, 70), "groups": groups, "gate": dice.random() < 0.5, "softplus": True}


def run(cases: int, seed: int) -> None:
    """Forward and backward of every operator in every type, on one thread and on two."""
    dice = random.Random(seed)
    for number in range(cases):
        for op in MAKERS:
            for dtype in DTYPES:
                torch.set_num_threads(1 + number % 2)
                arguments = draw(op, dice)
                print(op, dtype, arguments, flush=True)  # of the last one, where the sanitizer ends the process
                inputs, grads = MAKERS[op](**arguments, dtype=dtype), None
                # Narrow types round more in long chains than the tests' own tolerance for fixed shapes allows.
                tolerance = 1e-4 if dtype == DTYPES[0] else 0.05
                truth = truth_of(op, inputs)
                if number % 2:
                    inputs = {k: at_odd_address(x) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
                    grads = [at_odd_address(g) for g in output_grads(call_public(op, inputs))]
                assert_close_to_truth(op, inputs, truth, tolerance, grads)


def run_depthwise(cases: int, seed: int) -> None:
    """The convolution of inference on random shapes, on one thread and on two."""
    dice = random.Random(seed)
    for number in range(cases):
        torch.set_num_threads(1 + number % 2)
        channels = dice.choice([1, 15, 16, 17, 40, 64, 70, 256])
        shape = dice.randint(1, 3), dice.randint(1, 9), dice.randint(1, 9), channels
        silu, residual = dice.random() < 0.5, dice.random() < 0.5
        print("depthwise3x3_", shape, silu, residual, flush=True)
        x, weight, bias = torch.randn(shape), torch.randn(channels, 1, 3, 3), torch.randn(channels)
        wanted = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=channels)
        wanted = wanted.permute(0, 2, 3, 1) + (x if residual else 0)
        if number % 2:
            x, weight, bias = at_odd_address(x), at_odd_address(weight), at_odd_address(bias)
        backend.depthwise3x3_(x, weight, bias, silu, residual)
        torch.testing.assert_close(x, torch.nn.functional.silu(wanted) if silu else wanted, atol=1e-5, rtol=1e-5)


def overrun() -> None:
    """Tell a kernel that its input is longer than it is."""
    x, weight, y = torch.ones(1, 1, 64), torch.ones(1, 4), torch.empty(1, 1, 64)
    args = backend.ConvArgs(1, 1, 1 << 12, 4, 0, 0)
    args.x, args.weight, args.y = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    library.open_library()[0].ssmamba_conv_forward(ctypes.addressof(args), 0, 1)


if __name__ == "__main__":
    take_library(sys.argv[1])
    if sys.argv[2] == "overrun":
        overrun()
    else:
        run(int(sys.argv[2]), seed=int(sys.argv[3]))
        run_depthwise(int(sys.argv[2]), seed=int(sys.argv[3]))
    print("clean")
