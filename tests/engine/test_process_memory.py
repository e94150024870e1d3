"""Large blocks stay in the process: no page is cleared twice, and the user's own tuning wins."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from ssmamba_models.engine.process_memory import keep_large_blocks, large_blocks_kept

done = keep_large_blocks() if sys.argv[1] == "keep" else False
assert large_blocks_kept() == done
torch.set_num_threads(1)
for _ in range(8):  # the heap settles: small blocks take from a freed one until they have their own places
    torch.ones(2**25)  # 128 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    torch.ones(2**25)
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's: nothing to tune")


def faults_once_settled(mode, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS, mode]
    out = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout.split()
    return out[0] == "True", int(out[1])


def test_blocks_above_32_mib_are_reused():
    done, faults = faults_once_settled("keep")
    assert done
    _, default = faults_once_settled("leave")
    assert faults < default / 8


def test_the_users_own_tuning_is_left_alone():
    done, _ = faults_once_settled("keep", MALLOC_ARENA_MAX="2")
    assert not done
