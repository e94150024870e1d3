"""Jobs in another process (see killable_jobs.py), which a test may kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SETTINGS = {"batch_size": 4, "workers": 0}


class Jobs:
    """Runs jobs in another process (see killable_jobs.py)."""

    def __init__(self):
        self.said = {}
        program = Path(__file__).with_name("killable_jobs.py")
        self._server = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._answer("ready")

    def _answer(self, key):
        while True:
            line = self._server.stdout.readline()
            assert line, "the server died"
            said = json.loads(line)
            if key in said:
                return said[key]
            self.said.update(said)

    def start(self, slides, out, kill_at=None, **changes):
        """Begin with an extraction; `kill_at` N kills it at its N-th touch of a file of the job."""
        return self._start("extract", slides, out, kill_at, {**SETTINGS, **changes})

    def start_cutting(self, slides, out, kill_at=None, **changes):
        """Begin with cutting tiles."""
        return self._start("cut", slides, out, kill_at, changes)

    def _start(self, what, slides, out, kill_at, changes):
        self.said = {}
        order = {"what": what, "slides": str(slides), "out": str(out), "changes": changes, "kill_at": kill_at}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return self._answer("pid")

    def wait(self):
        return self._answer("ended")

    def close(self):
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()
