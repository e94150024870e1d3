"""Runs interpreted_cases.py in a pytest process of its own: triton reads TRITON_INTERPRET as it decorates a kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CASES = Path(__file__).with_name("interpreted_cases.py")
EXPECTED = 47  # a case that is silently not collected is noticed


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    triton = pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be interpreted")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SSMAMBA_BACKEND": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if "only 0-dimensional arrays can be converted" in run.stdout and triton.__version__ < "3.9":
        pytest.skip(f"the interpreter of triton {triton.__version__} does not work with numpy {np.__version__}")
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout[-2000:]
    assert int(passed[1]) == EXPECTED, f"{passed[1]} tests passed, expected {EXPECTED}"
    assert "skipped" not in run.stdout
