"""What a measurement was taken on: without it a number means nothing."""

from __future__ import annotations

import datetime
import functools
import os
import platform
from collections.abc import Collection
from pathlib import Path

import timm
import torch

from ssmamba_models._version import __version__
from ssmamba_models.cores import count_cores

# What of a CPU's instructions decides the speed of a model, as Linux names it and as people do.
_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
}
_BF16 = {"AVX512-BF16", "AMX-BF16", "BF16"}


def describe_machine(device: torch.device | str = "cpu") -> dict:
    """Processor, instruction sets, cores, threads, versions, GPU and date, ready for a JSON report.

    `threads` is the number in force now, so call it inside `use_threads`. `load_average` is the mean number of
    running processes over the minute before this process first asked: later ones would count its own work.
    `bf16_hardware` says whether the device has bf16 instructions. What the system does not tell is None.
    """
    device = torch.device(device)
    instructions = _instruction_sets()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_info("model name", "Hardware", "Model") or platform.processor() or platform.machine(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "instruction_sets": instructions,
        "bf16_hardware": _has_bf16(device, instructions),
        "cores": count_cores(),
        "threads": torch.get_num_threads(),
        "load_average": _load_before(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "ssmamba_models": __version__,
    }


def machine_text(machine: dict, dtypes: Collection[str] = ()) -> str:
    """`describe_machine` for a person: a line, and one more for each thing that makes the figures worth less.

    Args:
        machine: of `describe_machine`.
        dtypes: what was computed in.
    """
    load = machine["load_average"]
    known = ", ".join(machine["instruction_sets"] or [machine["simd"]])
    where = machine["gpu"] or f"{machine['cpu']} ({known}), {machine['threads']} threads"
    before = "" if load is None else f", load {load:.1f} before"
    lines = [f"{where}{before}; torch {machine['torch']}, timm {machine['timm']}; {machine['date'][:10]}"]
    if load is not None and load > machine["cores"] / 2:
        idle = "measure again on an idle machine"
        lines.append(f"warning: load average {load:.1f} at the start, on {machine['cores']} cores: {idle}")
    if "bfloat16" in dtypes and machine["bf16_hardware"] is False:
        lines.append("bfloat16: no hardware for it here; it is emulated")
    return "\n".join(lines)


def require_device(name: str) -> torch.device:
    """The device `name`, if it can be used here.

    Raises:
        ValueError: if it is neither "cpu" nor a CUDA device, or if torch sees no such GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown to torch; expected 'cpu' or 'cuda'") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} cannot be benchmarked; expected 'cpu' or 'cuda'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; "
            "use 'cpu', or install a driver and a torch build with CUDA (see `ssmamba doctor`)"
        )
    return device


def _cpu_info(*keys: str) -> str | None:
    """The first value of one of the keys in /proc/cpuinfo; Linux keeps there what Python's `platform` does not see."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None


def _instruction_sets() -> list[str] | None:
    flags = _cpu_info("flags", "Features")
    return None if flags is None else [name for flag, name in _INSTRUCTION_SETS.items() if flag in flags.split()]


def _has_bf16(device: torch.device, instruction_sets: Collection[str] | None) -> bool | None:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return None if instruction_sets is None else not _BF16.isdisjoint(instruction_sets)


@functools.cache
def _load_before() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
