"""The CPU cores that this process may really use: its affinity, the CPU quota of its cgroups, its share of both."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_TOPOLOGY = Path("/sys/devices/system/cpu")
_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")

_share: int | None = None


def count_cores() -> int:
    """Cores that this process may use, at least 1; hyper-threads count.

    The affinity mask, but no more than the cgroups' CPU quota (`cpu_quota`, rounded down) and the share that
    `limited_cores` sets.
    """
    return _within_limits(len(_affinity()))


def count_physical_cores() -> int:
    """As `count_cores`, but hyper-threads of one core are one, where the system tells them apart."""
    cores = _affinity()
    try:
        siblings = {(_TOPOLOGY / f"cpu{core}/topology/thread_siblings_list").read_text().strip() for core in cores}
    except OSError:
        return _within_limits(len(cores))
    return _within_limits(len(siblings))


def cpu_quota() -> float:
    """CPUs' worth of time that the cgroups of this process allow, such as 1.5; infinite where none limits it.

    The smallest quota of a cgroup and all above it up to the mount: `cpu.max` of version 2, `cpu.cfs_quota_us` over
    `cpu.cfs_period_us` of version 1. A container without its own cgroup namespace names the host's path, which is not
    in its mount: then what the mount has of that path counts, which is at least the container's own cgroup.
    """
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return math.inf
    return min((_quota(folder) for line in lines for folder in _cgroup_folders(line)), default=math.inf)


@contextlib.contextmanager
def limited_cores(share: int | None) -> Iterator[None]:
    """Within the block `count_cores` and `count_physical_cores` give no more than `share`; None changes nothing."""
    global _share
    before = _share
    _share = before if share is None else share
    try:
        yield
    finally:
        _share = before


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _within_limits(cores: int) -> int:
    return max(1, math.floor(min(cores, cpu_quota(), _share or math.inf)))


def _cgroup_folders(line: str) -> Iterator[Path]:
    """Folders that may hold the quota of a line (hierarchy:controllers:path) of /proc/self/cgroup."""
    _, _, rest = line.partition(":")
    controllers, _, path = rest.partition(":")
    if not controllers:
        # Beside version 1 that of version 2 is mounted one folder deeper.
        mounts = [_CGROUPS, _CGROUPS / "unified"]
    elif "cpu" in controllers.split(","):
        mounts = [_CGROUPS / controllers, _CGROUPS / "cpu"]
    else:
        return
    # ".." leads out of the cgroup namespace, to what is not mounted.
    inside = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..")))
    for mount in mounts:
        yield from (mount / folder for folder in (inside, *inside.parents))


def _quota(cgroup: Path) -> float:
    try:
        quota, _, period = (cgroup / "cpu.max").read_text().strip().partition(" ")
    except OSError:
        try:
            quota, period = ((cgroup / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return math.inf
    try:
        microseconds = int(quota)  # "max" and -1 are no limit
        return microseconds / int(period or 100_000) if microseconds > 0 else math.inf
    except (ValueError, ZeroDivisionError):
        return math.inf
