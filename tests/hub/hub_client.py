"""A process in which huggingface_hub reads its environment variables as a user's does: once, at import."""

import json
import os
import subprocess
import sys

_LOOP = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
sys.stdout = sys.stderr
import timm, torch
import ssmamba_models
for line in sys.stdin:
    request = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": request["token"]} if request["token"] else {})
    scope = {"timm": timm, "torch": torch, "ssmamba_models": ssmamba_models}
    try:
        exec(request["code"], scope)
        answer = {"value": scope.get("value")}
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answer = {"kinds": kinds, "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
"""


class RemoteError(Exception):
    """What the code raised in the other process: `kinds` are its class and the bases of that."""

    def __init__(self, kinds, message):
        super().__init__(message)
        self.kinds = kinds


class HubClient:
    """Runs code that sets `value`, with timm, torch and ssmamba_models at hand."""

    def __init__(self, endpoint, home, **environment):
        ours = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }
        others = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**others, **ours, **environment},
        )

    def __call__(self, code, token=None):
        print(json.dumps({"code": code, "token": token}), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        if "kinds" in answer:
            raise RemoteError(answer["kinds"], answer["message"])
        return answer["value"]

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)
