"""A program that runs jobs in children, so that a test may kill them: it imports torch once for all.

It reads lines of JSON (what, slides, out, changes, kill_at) and answers with the child's number, and once it has ended
with how. `kill_at` N makes the child kill itself at its N-th touch of a file of the job.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings

import torch
from job_cases import cut, extract

# What Python tells of before it happens; "os.rename" is os.replace too.
_TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.truncate"}


def count_touches(out: str, kill_at: int | None) -> list[int]:
    """Count what happens to files of the job, and die at one of them."""
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event in _TOUCHES and isinstance(arguments[0], (str, os.PathLike)):
            count[0] += os.fspath(arguments[0]).startswith(out)
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def run(what: str, slides: str, out: str, changes: dict, kill_at: int | None) -> None:
    count = count_touches(out, kill_at)
    try:
        {"extract": extract, "cut": cut}[what](slides, out, **changes)
        print(json.dumps({"touches": count[0]}), flush=True)
        os._exit(0)
    finally:
        os._exit(1)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(**json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
