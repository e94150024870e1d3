"""A few of the kills that `soak.py` does by the hundred."""

import subprocess
import sys
from pathlib import Path

import pytest

for package in ("accelerate", "tensorboard", "h5py", "openslide", "tifffile"):
    pytest.importorskip(package, reason="the jobs need the [train] and [wsi] extras")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the jobs are forks of a process that has torch loaded")
def test_killed_jobs_end_as_others_do(tmp_path):
    program = Path(__file__).with_name("soak.py")
    command = [sys.executable, str(program), "--kills", "4", "--seed", "1", "--out", str(tmp_path / "soak")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["extract", "pretrain", "slide-pretrain"]
    assert sum(int(row[3]) + int(row[4]) for row in rows) == 4
