"""The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer, once for each instruction set of this CPU.

The library that users have chooses among three variants of each kernel when it is loaded, by what the CPU can do, and
nothing can force another. So each variant is compiled here by itself (without __gnu_linux__, simd.h makes but one).
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ssmamba_models.ops.cpu

SOURCES = Path(ssmamba_models.ops.cpu.__file__).parent
PROGRAM = Path(__file__).with_name("sanitized.py")
# As setuptools compiles them (pyproject.toml), less the last steps of optimisation, which would take minutes.
FLAGS = ["-std=gnu11", "-O1", "-g1", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fno-omit-frame-pointer", "-U__gnu_linux__", "-shared", "-fPIC"]
ADDRESS = ["-fsanitize=address"]
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
# Instruction set -> what /proc/cpuinfo must list.
VARIANTS = {"x86-64": set(), "x86-64-v3": {"avx2", "fma", "bmi2"}, "x86-64-v4": {"avx512f", "avx512bw", "avx512vl"}}
CASES = int(os.environ.get("SSMAMBA_FUZZ_EXAMPLES", "3"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizer is loaded in Linux's way"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]


def build(folder, flags, march=()):
    """The kernels as a shared library; skips where the compiler lacks the sanitizers."""
    out = folder / "kernels.so"
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    done = subprocess.run(["gcc", *FLAGS, *flags, *march, *sources, "-o", str(out)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"gcc cannot build with {' '.join([*flags, *march])}: {done.stderr.splitlines()[-1]}")
    return out


def run(library, *arguments):
    """Run the program with the sanitizer before all other libraries, as it wants to be."""
    # libstdc++ too: the sanitizer looks for what throws exceptions before torch brings it.
    preload = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        # torch and Python leave much to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:alloc_dealloc_mismatch=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SSMAMBA_BACKEND": "c",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, str(PROGRAM), str(library), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_shapes(tmp_path, variant):
    if not on_this_cpu(variant):
        pytest.skip(f"this CPU does not run {variant}")
    march = [] if platform.machine() != "x86_64" else [f"-march={variant}"]
    done = run(build(tmp_path, [*ADDRESS, *UNDEFINED], march), CASES, 0)
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    assert done.stdout.splitlines()[-1] == "clean"
    # Three scans in three types, three operators of a block.
    assert len(done.stdout.splitlines()) == (3 * 3 + 3) * CASES + 1


def on_this_cpu(variant):
    if platform.machine() != "x86_64":
        return variant == "x86-64"  # other machines have one variant, whatever it is called here
    with open("/proc/cpuinfo") as file:
        flags = next((set(line.split()) for line in file if line.startswith("flags")), set())
    return VARIANTS[variant] <= flags


def test_the_sanitizer_is_awake(tmp_path):
    """A kernel that is told of a longer input than there is must be caught, or the test above shows nothing."""
    done = run(build(tmp_path, ADDRESS), "overrun")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "ssmamba_conv_forward" in done.stderr or "conv1d.c" in done.stderr
