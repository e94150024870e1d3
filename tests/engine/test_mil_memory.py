"""Bags of 100,000 tiles train and predict in bounded memory; each measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")

# Run by a fresh interpreter: the peak is that of its whole life.
PROGRAM = """
import sys, torch
from ssmamba_models.slide.aggregators import create_aggregator

def peak():
    # Not getrusage: there a child starts with its parent's peak, and a whole test suite's is high.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) / 1024

torch.manual_seed(0)
torch.set_num_threads(1)
name, train, tiles, width = sys.argv[1], sys.argv[2] == "train", int(sys.argv[3]), 64
model = create_aggregator(name, width, 2, **{"dim" if name == "mambamil" else "hidden_dim": width})
side = int(tiles**0.5) + 1
places = torch.arange(tiles)
coords = torch.stack((places % side, places // side), -1)[None] * 448

def once(count):
    features = torch.randn(1, count, width)
    with torch.set_grad_enabled(train):
        output = model.train(train)(features, coords[:, :count])
        if train:
            model.loss(output, torch.tensor([1])).backward()
    assert output["attention"].shape == (1, count)

once(100)
before = peak()
once(tiles)
print(peak() - before)
"""
# MB beyond what the libraries take. One float32 copy of such a bag is 25.6 MB; if it kept all eight readings for the
# backward pass, mambamil alone would need 1300 MB.
LIMITS = {("abmil", "predict"): 300, ("abmil", "train"): 500, ("mambamil", "predict"): 450, ("mambamil", "train"): 750}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "what"), list(LIMITS))
def test_a_hundred_thousand_tiles(name, what):
    if name == "abmil":
        pytest.importorskip("torchmil", reason="abmil needs the [mil] extra")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, what, "100000"],
        capture_output=True,
        text=True,
        check=False,
        # What is freed must leave the process, or the peak is that of glibc's heap and not of what is in use.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    assert result.returncode == 0, result.stderr
    assert 25.6 < float(result.stdout) < LIMITS[name, what]
