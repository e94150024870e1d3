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
from test_block_operators import OPERATORS, make

from ssmamba_models.ops import reference
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


def run_block_operators(cases: int, seed: int) -> None:
    """The operators of a block, forward and backward on random shapes, on one thread and on two."""
    dice = random.Random(seed)
    for number in range(cases):
        torch.set_num_threads(1 + number % 2)
        for op, function in OPERATORS.items():
            shape = (*(dice.randint(1, high) for high in (3, 9, 9)), dice.choice([15, 16, 17, 40, 64, 70, 256]))
            dtype = dice.choice(DTYPES)
            print(op, shape, dtype, flush=True)
            tensors, others = make(op, shape, dtype, seed=number, outputs=dice.choice([1, 16, 50]))
            if number % 2:
                tensors = [at_odd_address(t) for t in tensors]
            tensors = [t.requires_grad_() for t in tensors]
            y = function(*tensors, *others)
            wanted = getattr(reference, op)(*tensors, *others)
            torch.testing.assert_close(y, wanted, atol=0.05 if dtype != DTYPES[0] else 1e-4, rtol=0.05)
            y.sum().backward()


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
        run_block_operators(int(sys.argv[2]), seed=int(sys.argv[3]))
    print("clean")
