"""What a measurement was taken on: without it a number means nothing."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import timm
import torch

from ssmamba_models._version import __version__
from ssmamba_models.cores import count_cores


def describe_machine(device: torch.device | str = "cpu") -> dict:
    """Processor, cores, threads, versions, GPU and date, ready for a JSON report.

    `threads` is the number in force now, so call it inside `use_threads`. `load_average` is the mean number
    of running processes over the last minute, before the run: much above zero, others were at work.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": count_cores(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": _gpu_name(torch.device(device)),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "ssmamba_models": __version__,
    }


def machine_line(machine: dict) -> str:
    """One line for a person out of `describe_machine`."""
    where = machine["gpu"] or f"{machine['cpu']} ({machine['simd']}), {machine['threads']} threads"
    load = "" if machine["load_average"] is None else f", load {machine['load_average']:.1f} before"
    return f"{where}{load}; torch {machine['torch']}, timm {machine['timm']}; {machine['date'][:10]}"


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


def _cpu_model() -> str:
    """The processor's name; Linux keeps it where Python's `platform` does not look."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def _gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
