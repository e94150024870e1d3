"""The scan kernels: which backends are there, why one is missing, and which runs where."""

from __future__ import annotations

import os

from ssmamba_models.cli.checks.finding import Finding
from ssmamba_models.cli.checks.machine import has_gpu
from ssmamba_models.cli.checks.probe import Probe

_SUBJECT = "kernels"

# Run by the probe that imports the core packages.
BACKENDS = """
def backend_facts():
    from ssmamba_models.ops import backends
    return backends()
attempt("backends", backend_facts)
"""


def check_kernels(probe: Probe) -> list[Finding]:
    """Judge what `BACKENDS` found, on a machine of which `TORCH_FACTS` found what it has."""
    state, error = probe.part("backends")
    if error:
        forced = "SSMAMBA_BACKEND" in os.environ
        cure = "unset SSMAMBA_BACKEND" if forced else "see the first problem under packages"
        return [Finding(_SUBJECT, "backends", "problem", f"cannot be asked: {error}", cure)]
    gpu = has_gpu(probe.part("torch")[0])
    return [
        *_forced(state),
        *(_backend(name, facts, gpu) for name, facts in state["backends"].items()),
        *(_operator(name, chosen, state) for name, chosen in state["operators"].items()),
    ]


def _forced(state: dict) -> list[Finding]:
    name = state["forced"]
    if not name:
        return []
    text = f"SSMAMBA_BACKEND={name} decides, not the machine"
    facts = state["backends"][name]
    if not facts["available"]:
        text = f"SSMAMBA_BACKEND={name}, but that is not available: {facts['reason']}"
        return [Finding(_SUBJECT, "forced", "problem", text, "unset SSMAMBA_BACKEND")]
    return [Finding(_SUBJECT, "forced", "warning", text, "unset SSMAMBA_BACKEND to let the fastest run")]


def _backend(name: str, facts: dict, gpu: bool) -> Finding:
    if facts["available"]:
        return Finding(_SUBJECT, name, "ok", f"available on {', '.join(facts['devices'])}")
    # Without a GPU its backends are missing as they should be: nobody mends that by buying one.
    cure = facts["cure"] if gpu or facts["devices"] != ["cuda"] else ""
    return Finding(_SUBJECT, name, "warning" if cure else "ok", f"not available: {facts['reason']}", cure)


def _operator(name: str, chosen: dict, state: dict) -> Finding:
    text = ", ".join(f"{device}: {backend}" for device, backend in chosen.items())
    if any(backend not in state["backends"] for backend in chosen.values()):
        cure = "unset SSMAMBA_BACKEND" if state["forced"] else "reinstall ssmamba-models"
        return Finding(_SUBJECT, name, "problem", text, cure)
    return Finding(_SUBJECT, name, "ok", text)
