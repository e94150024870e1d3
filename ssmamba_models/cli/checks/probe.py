"""Try things in another Python process, so that what crashes there does not crash the doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Marks our lines among what imported packages print.
_MARK = "@ssmamba-probe@"
_PRELUDE = f"""
import json, sys
if sys.version_info < (3, 11) and sys.path[0] == "":
    del sys.path[0]  # what PYTHONSAFEPATH does from 3.11 on
def report(**facts):
    print({_MARK!r} + json.dumps(facts), flush=True)
def attempt(part, function):
    try:
        report(part=part, facts=function())
    except BaseException as error:
        report(part=part, error=f"{{type(error).__name__}}: {{error}}")
"""


@dataclass(frozen=True)
class Probe:
    """What a probe said before it ended.

    Attributes:
        facts: what it passed to `report(...)`, in order.
        failure: one line that says how it ended; empty where it ended well.
    """

    facts: list[dict]
    failure: str

    def part(self, name: str) -> tuple[dict, str]:
        """What `attempt(name, function)` gave: the facts and "", or {} and one line that says why not."""
        found = [fact for fact in self.facts if fact.get("part") == name]
        if not found:
            return {}, self.failure or "no answer"
        return found[-1].get("facts", {}), found[-1].get("error", "")


def start_probe(code: str, *arguments: str) -> subprocess.Popen:
    """Run Python code, which calls `report(name=value, ...)` and `attempt(name, function)`, on its own.

    Args:
        code: the program; its `sys.argv[1:]` are the arguments.
    """
    return subprocess.Popen(
        [sys.executable, "-c", _PRELUDE + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # A stray torch.py in the current folder is no part of the installation.
        env={**os.environ, "PYTHONPATH": _path_of_this_package(), "PYTHONSAFEPATH": "1"},
    )


def _path_of_this_package() -> str:
    # The probe must see the very package that is running, also from a checkout that is not installed.
    here = str(Path(__file__).resolve().parents[3])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))


def finish_probe(process: subprocess.Popen, timeout: float = 180) -> Probe:
    """Wait for a probe and read what it reported.

    Args:
        process: what `start_probe` returned.
        timeout: seconds after which it is ended; an import that takes longer hangs.
    """
    try:
        out, err = process.communicate(timeout=timeout)
        failure = _describe_end(process.returncode, err)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        failure = f"no answer within {timeout:.0f} s"
    lines = [line.removeprefix(_MARK) for line in out.splitlines() if line.startswith(_MARK)]
    return Probe([json.loads(line) for line in lines], failure)


def _describe_end(returncode: int, err: str) -> str:
    if returncode == 0:
        return ""
    last = (err.strip().splitlines() or ["no message"])[-1]
    return f"crashed with signal {-returncode}" if returncode < 0 else last
