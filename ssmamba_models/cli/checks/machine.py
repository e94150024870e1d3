"""The machine: system, processor, threads, shared memory, and the devices that torch sees."""

from __future__ import annotations

import math
import os
import platform
import shutil
from pathlib import Path

from ssmamba_models.cli.checks.finding import Finding
from ssmamba_models.cli.checks.probe import Probe
from ssmamba_models.cores import count_cores, cpu_quota
from ssmamba_models.threads import WAITING

_SUBJECT = "machine"
# A batch of 32 tiles of 224 px takes 19 MB, and each worker holds two.
_SHARED_MEMORY = 256 * 2**20

# Run by the probe that imports the core packages.
TORCH_FACTS = """
def torch_facts():
    import torch
    return {
        "threads": torch.get_num_threads(),
        "built_for": torch.version.cuda or torch.version.hip or "",
        "other": torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "",
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "bf16": bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)),
    }
attempt("torch", torch_facts)
"""


def check_machine(probe: Probe) -> list[Finding]:
    """Describe the machine, with what `TORCH_FACTS` found."""
    quota = "" if math.isinf(cpu_quota()) else f" (CPU quota {cpu_quota():g})"
    processor = f"{_processor()}, {count_cores()} of {os.cpu_count()} cores usable{quota}"
    findings = [
        Finding(_SUBJECT, "system", "ok", platform.platform()),
        Finding(_SUBJECT, "processor", "ok", processor),
        *_shared_memory(),
    ]
    facts, error = probe.part("torch")
    if error:
        text = f"unknown, because torch failed: {error}"
        return [*findings, Finding(_SUBJECT, "devices", "problem", text, "see torch under packages")]
    return [*findings, _threads(facts), _devices(facts)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _threads(facts: dict) -> Finding:
    threads, cores = facts["threads"], count_cores()
    if threads > cores:
        text = f"torch uses {threads} threads on {cores} cores"
        return Finding(_SUBJECT, "threads", "warning", text, f"export OMP_NUM_THREADS={cores}")
    waiting = ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)
    return Finding(_SUBJECT, "threads", "ok", f"torch uses {threads}" + (f" ({waiting})" if waiting else ""))


def _shared_memory() -> list[Finding]:
    if not os.path.isdir("/dev/shm"):
        return []
    free = shutil.disk_usage("/dev/shm").free
    text = f"{free / 2**20:.0f} MiB free in /dev/shm"
    if free < _SHARED_MEMORY:
        cure = "in a container: docker run --shm-size=1g; or use --workers 0"
        return [Finding(_SUBJECT, "shared memory", "warning", f"{text}, little for worker processes", cure)]
    return [Finding(_SUBJECT, "shared memory", "ok", text)]


def has_gpu(facts: dict) -> bool:
    """Whether this machine has a GPU, of use to torch or not, by what `TORCH_FACTS` found."""
    return bool(facts.get("devices")) or os.path.exists("/dev/nvidia0")


def _devices(facts: dict) -> Finding:
    if facts["devices"]:
        bf16 = "bfloat16" if facts["bf16"] else "no bfloat16"
        return Finding(_SUBJECT, "devices", "ok", f"cpu, cuda: {', '.join(facts['devices'])} ({bf16})")
    if has_gpu(facts):
        cause = f"torch is built for CUDA {facts['built_for']}" if facts["built_for"] else "torch is a CPU build"
        cure = "install a torch for the CUDA version that nvidia-smi names: see pytorch.org/get-started"
        return Finding(_SUBJECT, "devices", "warning", f"an NVIDIA GPU is there, torch cannot use it ({cause})", cure)
    if facts.get("other"):
        return Finding(_SUBJECT, "devices", "ok", f"cpu, {facts['other']}")
    return Finding(_SUBJECT, "devices", "ok", "cpu (no GPU seen)")
