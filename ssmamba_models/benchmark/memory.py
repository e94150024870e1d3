"""Peak memory of one model step: what it takes on top of the model and its batch.

On a CPU only a fresh process can tell: an allocator keeps what earlier models freed. So `measure_peak_mib`
starts this module as a script, which prints its measurement as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ssmamba_models.benchmark.model_step import ModelStep, StepSpec
from ssmamba_models.engine.process_memory import keep_large_blocks
from ssmamba_models.threads import use_threads

MIB = 2**20


def measure_peak_mib(spec: StepSpec, *, kept: bool = False) -> float:
    """MiB of memory that the first step of `spec` adds at its peak; for training with gradients and moments.

    On CUDA the caching allocator counts, in this process; on a CPU a process of its own does, which keeps large freed
    blocks where `kept` says so (engine.process_memory).

    Raises:
        RuntimeError: if the process fails; its last line of output says why.
    """
    if torch.device(spec.device).type == "cuda":
        return _peak_on_cuda(spec)
    command = [sys.executable, "-m", "ssmamba_models.benchmark.memory", json.dumps(spec.as_dict()), str(int(kept))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"]
        raise RuntimeError(f"{spec.name} at {spec.size} px: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"]


def _peak_on_cuda(spec: StepSpec) -> float:
    step = ModelStep(spec)
    torch.cuda.synchronize(spec.device)
    before = torch.cuda.memory_allocated(spec.device)
    torch.cuda.reset_peak_memory_stats(spec.device)
    step()
    torch.cuda.synchronize(spec.device)
    return (torch.cuda.max_memory_allocated(spec.device) - before) / MIB


def _peak_on_cpu(spec: StepSpec) -> float:
    """The growth of this process's high-water mark over one step."""
    with use_threads(spec.threads):
        step = ModelStep(spec)
        _load_libraries()
        return growth_mib(step)


def growth_mib(call: Callable[[], object]) -> float:
    """MiB by which a call raises this process's high-water mark; true in a process that did nothing large before."""
    lower_high_water_mark()
    before = _high_water_mark()
    call()
    return (_high_water_mark() - before) / MIB


def _load_libraries() -> None:
    """Touch what torch loads on first use, so that it is not taken for the model's own memory."""
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(6, 6))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8, 8, 8)).sum().backward()
    optimizer.step()


def lower_high_water_mark() -> None:
    """Let the mark be what is in use now, where the system can do that (Linux outside of strict containers).

    Elsewhere it still holds the peak of what this process did before.
    """
    with contextlib.suppress(OSError):
        clear_refs = Path("/proc/self/clear_refs")
        if clear_refs.exists():
            clear_refs.write_text("5")


def _high_water_mark() -> int:
    """The most bytes that this process has held at once.

    Linux's `ru_maxrss` will not do: a child inherits its parent's there, and the parent holds every model.
    """
    if sys.platform != "linux":
        return _high_water_mark_elsewhere()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line; this kernel does not report peak memory")


def _high_water_mark_elsewhere() -> int:
    try:
        import resource  # not on Windows
    except ImportError:
        raise OSError(f"peak memory cannot be measured on {sys.platform}; pass --no-memory (memory=False)") from None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS alone counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    if sys.argv[2] == "1":
        keep_large_blocks()
    # The package registers its models with timm when imported, which `-m` has done by now.
    print(json.dumps({"peak_mib": _peak_on_cpu(StepSpec(**json.loads(sys.argv[1])))}))
