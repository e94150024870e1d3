"""The cores of this machine that are ours to use."""

from __future__ import annotations

import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def count_cores() -> int:
    """Cores that this process may run on, which in a container are fewer than the machine has; hyper-threads count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_physical_cores() -> int:
    """As `count_cores`, but hyper-threads of one core are one, where the system tells them apart."""
    if not hasattr(os, "sched_getaffinity"):
        return count_cores()
    try:
        siblings = {
            (_TOPOLOGY / f"cpu{core}" / "topology" / "thread_siblings_list").read_text().strip()
            for core in os.sched_getaffinity(0)
        }
    except OSError:
        return count_cores()
    return len(siblings)
