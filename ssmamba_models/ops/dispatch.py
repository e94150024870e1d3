"""Which backend computes an operator: a table, an environment variable, and a report of both.

A backend is a module with the functions of :mod:`ssmamba_models.ops.vectorized`: one forward and one backward per
operator, `why_missing(device)` and `unsupported(op, dtype, states)`. To add one, write the module and name it here.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ssmamba_models.notice import SSMambaWarning

OPERATORS = ("directional_scan", "selective_scan", "causal_conv1d")
VARIABLE = "SSMAMBA_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One way to compute the operators.

    Attributes:
        module: module with its functions, imported when first needed.
        devices: torch device types it runs on; empty for any.
    """

    name: str
    module: str
    devices: tuple[str, ...]

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)

    def why_missing(self, device: torch.device | None = None) -> tuple[str, str]:
        """("", "") if it can run on this device, the current one by default, else the reason and the cure."""
        try:
            return self.load().why_missing(device)
        except ImportError as error:
            return f"it cannot be imported ({error})", ""


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("c", "ssmamba_models.ops.cpu.backend", ("cpu",)),
        Backend("triton", "ssmamba_models.ops.triton.backend", ("cuda",)),
        Backend("cuda", "ssmamba_models.ops.cuda", ("cuda",)),
        Backend("torch", "ssmamba_models.ops.vectorized", ()),
        Backend("reference", "ssmamba_models.ops.naive", ()),
    )
}

# Device type -> operator -> backends, best first. Other devices (MPS, XPU) have torch alone.
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": dict.fromkeys(OPERATORS, ("c", "torch")),
    # torch calls ROCm devices "cuda" too. A row per operator: whichever is measured faster for it goes first.
    "cuda": {
        "directional_scan": ("triton", "cuda", "torch"),
        "selective_scan": ("triton", "cuda", "torch"),
        "causal_conv1d": ("triton", "cuda", "torch"),
    },
}


def _candidates(op: str, device: str) -> tuple[str, ...]:
    return PREFERENCE.get(device, {}).get(op, ("torch",))


@functools.cache
def _missing(name: str, device: torch.device) -> tuple[str, str]:
    """See :meth:`Backend.why_missing`; of a machine's GPUs one may be too old."""
    return BACKENDS[name].why_missing(device if device.type in BACKENDS[name].devices else None)


def forced() -> str | None:
    """The backend that SSMAMBA_BACKEND names, if it names one.

    Raises:
        ValueError: there is no backend of that name.
    """
    name = os.environ.get(VARIABLE, "").strip().lower()
    if not name:
        return None
    if name not in BACKENDS:
        raise ValueError(f"{VARIABLE}={name!r} names no backend: use one of {', '.join(sorted(BACKENDS))}, or unset it")
    return name


def _obstacle(name: str, op: str, device: torch.device, dtype: torch.dtype, states: int) -> tuple[str, str]:
    """Why a backend cannot serve a call, and the cure; ("", "") if it can."""
    backend = BACKENDS[name]
    if backend.devices and device.type not in backend.devices:
        devices = " and ".join(backend.devices)
        return f"it runs on {devices} only, the tensors are on {device.type}", f"move them to {devices}"
    reason, cure = _missing(name, device)
    if reason:
        return reason, cure
    return backend.load().unsupported(op, dtype, states), ""


@functools.cache
def _choose(op: str, device: torch.device, dtype: torch.dtype, states: int, name: str | None) -> ModuleType:
    if name is not None:
        reason, cure = _obstacle(name, op, device, dtype, states)
        if reason:
            raise ValueError(
                f"{VARIABLE}={name} cannot run {op} here: {reason}. Unset {VARIABLE}{' or ' + cure if cure else ''}."
            )
        return BACKENDS[name].load()
    for candidate in _candidates(op, device.type):
        if not _obstacle(candidate, op, device, dtype, states)[0]:
            _warn_of_missing(op, device)
            return BACKENDS[candidate].load()
    raise RuntimeError(f"no backend can run {op} on {device}")  # torch always can


@functools.cache
def _warn_of_missing(op: str, device: torch.device) -> None:
    """Say once that a faster backend could be had."""
    best = _candidates(op, device.type)[0]
    reason, cure = _missing(best, device)
    if reason and not _warned(best):
        cure = f" To mend it, {cure}." if cure else ""
        warnings.warn(
            f"ssmamba_models runs its scans on {device} with a slower backend than it could: backend {best!r} is "
            f"missing, because {reason}.{cure} (`ssmamba doctor` tells more.)",
            SSMambaWarning,
            stacklevel=2,
        )


_said: set[str] = set()


def _warned(name: str) -> bool:
    seen = name in _said
    _said.add(name)
    return seen


def select(op: str, u: Tensor, states: int = 1) -> ModuleType:
    """The backend module that computes `op` for tensors like `u`.

    Raises:
        ValueError: SSMAMBA_BACKEND forces a backend that cannot.
    """
    return _choose(op, u.device, u.dtype, states, forced())


def is_served_by(name: str, device: str) -> bool:
    """Whether this backend is there, for tensors on this type of device, and no other one is asked for.

    Raises:
        ValueError: SSMAMBA_BACKEND names no backend.
    """
    devices = BACKENDS[name].devices
    return forced() in (None, name) and (not devices or device in devices) and not _missing(name, _present(device))[0]


def backends() -> dict[str, Any]:
    """What there is and what will be used: plain data, ready for JSON.

    Returns:
        `forced`: the value of SSMAMBA_BACKEND or None. `backends`: for each, `available`, `devices`, and where it is
        missing `reason` and `cure`. `operators`: operator -> device type -> the backend that serves float32 there.
    """
    name = forced()
    report = {}
    for backend in BACKENDS.values():
        devices = list(backend.devices) or ["any"]
        reason, cure = _missing(backend.name, _present(backend.devices[0] if backend.devices else "cpu"))
        report[backend.name] = {"available": not reason, "devices": devices, "reason": reason, "cure": cure}
    operators = {op: {device: _serving(op, device, name) for device in _devices()} for op in OPERATORS}
    return {"forced": name, "backends": report, "operators": operators}


def _devices() -> list[str]:
    present = ["cpu"]
    for device in ("cuda", "mps", "xpu"):
        module = getattr(torch, device, None)
        if module is not None and module.is_available():
            present.append(device)
    return present


def _present(device: str) -> torch.device:
    """The device of this type that torch uses where none is named."""
    return torch.device(device, torch.cuda.current_device() if device == "cuda" and torch.cuda.is_available() else 0)


def _serving(op: str, device: str, name: str | None) -> str:
    for candidate in (name,) if name else _candidates(op, device):
        if not _obstacle(candidate, op, _present(device), torch.float32, 1)[0]:
            return candidate
    return "none: the forced backend cannot run here"
