"""The Triton backend: what :mod:`ssmamba_models.ops.dispatch` asks of one, and its functions."""

from __future__ import annotations

import os
import shutil

import torch

MOST_STATES = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_TRITON = (3, 3)  # the first with tuples of tensors as loop variables
OLDEST_GPU = (7, 0)


def why_missing(device: torch.device | None = None) -> tuple[str, str]:
    """("", "") if kernels can run on this device, the current one by default, else the reason and the cure."""
    if not torch.cuda.is_available():
        return "there is no CUDA or ROCm device", "use a machine with a GPU and a torch build for it"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        name = torch.cuda.get_device_name(device)
        return f"{name} is older than triton supports", "use a GPU of compute capability 7.0 or newer"
    try:
        import triton
    except Exception as error:  # a broken installation raises anything
        return f"triton cannot be imported ({error})", "install it: pip install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        need = ".".join(map(str, OLDEST_TRITON))
        return f"triton is {triton.__version__}, the kernels need {need} or newer", f'pip install "triton>={need}"'
    if not (os.environ.get("CC") or any(shutil.which(name) for name in ("gcc", "clang", "cc"))):
        return "triton finds no C compiler, with which it builds its launcher", "install one: apt-get install gcc"
    return "", ""


def unsupported(op: str, dtype: torch.dtype, states: int) -> str:
    """Why these arguments cannot be served, or ""."""
    if dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if states > MOST_STATES:
        return f"it holds up to {MOST_STATES} states, not {states}"
    return ""


def __getattr__(name: str):
    """The operators, imported with the first call: only then is triton there for certain."""
    from ssmamba_models.ops.triton import convolution, directional, selective

    for module in (directional, selective, convolution):
        if name.startswith(("directional_scan", "selective_scan", "causal_conv1d")) and hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
