"""AVX-512, AVX512-BF16 and AMX on CPUs that lack them: the same files with their products in plain C."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from planned_cases import images, small

import ssmamba_models.ops.cpu
from ssmamba_models.inference.planned import PlannedSSMamba
from ssmamba_models.ops.cpu import library, plan

SOURCES = Path(ssmamba_models.ops.cpu.__file__).parent
FLAGS = [
    "-std=gnu11",
    "-O1",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]
SETS = {"avx512": 1e-5, "avx512_bf16": 1e-2, "amx_bf16": 1e-2}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="x86's instruction sets"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The operators of an emulating library, for this module's tests."""
    path = tmp_path_factory.mktemp("emulated") / "kernels.so"
    sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
    command = ["gcc", *FLAGS, "-DSSMAMBA_EMULATE", "-shared", "-fPIC", *sources, "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    handle = library.load(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "open_library", lambda: (handle, ""))
        plan.instruction_sets.cache_clear()
        usable = {s.name for s in plan.instruction_sets() if s.usable}
        if not usable >= set(SETS):
            pytest.skip("this CPU has no AVX2")
        yield
    plan.instruction_sets.cache_clear()


def maps(model, x):
    with torch.inference_mode():
        return model.forward_intermediates(x, intermediates_only=True)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("changes", [{}, {"dims": (9, 17, 33, 50)}, {"dims": (16, 24, 40, 560)}], ids=str)
@pytest.mark.parametrize("instructions", SETS)
def test_equals_the_model(instructions, changes):
    model = small(depths=(1, 1, 1, 1), **changes)
    precision = "float32" if instructions == "avx512" else "bfloat16"
    fast = PlannedSSMamba(model, precision, instructions=instructions)
    assert fast.instructions.bf16 == (precision == "bfloat16")
    # The widest layer's products are long: what bfloat16 rounds adds up.
    bound = SETS[instructions] * (2 if changes.get("dims", (0,))[-1] == 560 else 1)
    for size in ((33, 40), (1, 7)):
        x = images(3, 3, *size)
        for result, wanted in zip(maps(fast, x), maps(model.double(), x.double()), strict=True):
            assert ((result - wanted).norm() / wanted.norm()).item() < bound
        model.float()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16"])
def test_packaged_weights_in_bfloat16(instructions):
    import timm

    model = timm.create_model("ssmamba_tiny", pretrained=True, num_classes=0).eval()
    x = images(1, 3, 64, 64)
    with torch.inference_mode():
        wanted, result = model(x), PlannedSSMamba(model, "bfloat16", instructions=instructions)(x)
    assert ((result - wanted).norm() / wanted.norm()).item() < 1e-2
    assert torch.cosine_similarity(result, wanted).min().item() > 0.9999
