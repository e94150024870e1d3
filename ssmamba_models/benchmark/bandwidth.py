"""How fast the device copies memory: the floor under every operator that does little arithmetic."""

from __future__ import annotations

import torch

from ssmamba_models.benchmark.timing import time_interleaved

# Well beyond the caches, and long enough on a GPU for its launch not to count.
COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 1024 * 2**20}


def copy_bandwidth(device: torch.device | str, size: int | None = None) -> float:
    """Bytes per second, read and written together, of copying a tensor on `device`.

    Args:
        device: "cpu" or a CUDA device.
        size: bytes to copy; None for `COPY_BYTES`.
    """
    device = torch.device(device)
    size = size or COPY_BYTES[device.type]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": lambda: target.copy_(source)}, device=device, rounds=5)["copy"]
    return 2 * size / (timing.median_ms * 1e-3)
