"""The state of a process's random number generators, as a checkpoint can hold it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch (every device), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw on the CPU from `seed` inside the block; the caller's generators go on as if it had not been."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed those of the GPUs too, which nothing puts back.
        torch.default_generator.manual_seed(seed)
        yield


def rng_state(device: torch.device) -> dict[str, Any]:
    """The generators' states, of tensors, numbers, strings and tuples alone, so that `weights_only` reads them."""
    numpy = np.random.get_state(legacy=False)
    keys, position = torch.from_numpy(numpy["state"]["key"].astype(np.int64)), numpy["state"]["pos"]
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (numpy["bit_generator"], keys, position, numpy["has_gauss"], numpy["gauss"]),
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back into a state of `rng_state`."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
