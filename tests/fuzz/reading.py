"""The other side of `reading_process`: what came of reading a file, and what may come of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# In all, per property; the default keeps CI short. With more examples than that each run draws others.
_BUDGET = os.environ.get("SSMAMBA_FUZZ_EXAMPLES")


def budget(examples: int) -> settings:
    """Settings of a property: so many examples, the same in every run, or as many as SSMAMBA_FUZZ_EXAMPLES says."""
    return settings(
        max_examples=int(_BUDGET or examples),
        derandomize=_BUDGET is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=True,
        print_blob=False,
    )


class Readers:
    """Reads files by the functions of `reading_process`, each in a child of its own."""

    def __init__(self):
        program = Path(__file__).with_name("reading_process.py")
        self._server = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def read(self, reader: str, path: Path) -> dict:
        """What came of it: "how" (result, error, crash or hang), and of an error "types" and "message"."""
        self._server.stdin.write(json.dumps({"reader": reader, "path": str(path)}) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, "the server died"
        return json.loads(line)

    def check(self, reader: str, path: Path, name: str | None = None) -> dict:
        """Read a file, which must give a right result or an error that a person can act on.

        Args:
            reader: of `reading_process.READERS`.
            path: what it is given.
            name: what the message must hold; None for the path's last part.

        Returns:
            As `read`.
        """
        found = self.read(reader, path)
        assert found["how"] in ("result", "error"), f"{reader}: {found}"
        if found["how"] == "error":
            known = {"ValueError", "OSError"} & set(found["types"])
            assert known, f"{reader}: {found['types'][0]}: {found['message']}\n{found['trace']}"
            assert (name or path.name) in found["message"] or "TileError" in found["types"], (
                f"{reader}: {found['types'][0]} does not name the file: {found['message']}\n{found['trace']}"
            )
        return found

    def close(self):
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()
