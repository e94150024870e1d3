"""The scan kernels: which backends are there, why one is missing, and which runs where."""

from __future__ import annotations

import subprocess

from ssmamba_models.cli.checks.finding import Finding
from ssmamba_models.cli.checks.probe import finish_probe, start_probe

_SUBJECT = "kernels"

_BACKENDS = """
from ssmamba_models.ops import backends
report(**backends())
"""


def start_backends() -> subprocess.Popen:
    """Begin to ask the package, in a process of its own, for its backends."""
    return start_probe(_BACKENDS)


def check_kernels(process: subprocess.Popen) -> list[Finding]:
    """Judge what `start_backends` began."""
    probe = finish_probe(process)
    if probe.failure or not probe.facts:
        text = f"cannot be asked: {probe.failure or 'no answer'}"
        return [Finding(_SUBJECT, "backends", "problem", text, "see the first problem under packages")]
    state = probe.facts[-1]
    return [
        *_forced(state),
        *(_backend(name, facts) for name, facts in state["backends"].items()),
        *(_operator(name, chosen) for name, chosen in state["operators"].items()),
    ]


def _forced(state: dict) -> list[Finding]:
    name = state["forced"]
    if not name:
        return []
    facts = state["backends"].get(name)
    text = f"SSMAMBA_BACKEND={name} decides, not the machine"
    if facts is None or not facts["available"]:
        why = "there is no such backend" if facts is None else facts["reason"]
        cure = "unset SSMAMBA_BACKEND"
        return [Finding(_SUBJECT, "forced", "problem", f"SSMAMBA_BACKEND={name}, but {why}", cure)]
    return [Finding(_SUBJECT, "forced", "warning", text, "unset SSMAMBA_BACKEND to let the fastest run")]


def _backend(name: str, facts: dict) -> Finding:
    if facts["available"]:
        return Finding(_SUBJECT, name, "ok", f"available on {', '.join(facts['devices'])}")
    # Where there is nothing to be done (no GPU, for one) a missing backend is as it should be.
    status = "warning" if facts["cure"] else "ok"
    return Finding(_SUBJECT, name, status, f"not available: {facts['reason']}", facts["cure"])


def _operator(name: str, chosen: dict) -> Finding:
    text = ", ".join(f"{device}: {backend}" for device, backend in chosen.items() if backend)
    if not text:
        return Finding(_SUBJECT, name, "problem", "no backend can run it", "reinstall ssmamba-models")
    return Finding(_SUBJECT, name, "ok", text)
