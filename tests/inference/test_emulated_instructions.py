"""AVX-512, AVX512-BF16, VNNI and AMX on CPUs that lack them: the same files with their products in plain C."""

from __future__ import annotations

import csv
import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from planned_cases import images, small
from timm.data import create_transform, resolve_model_data_config

import ssmamba_models.ops.cpu
from ssmamba_models.engine.encoder import load_encoder
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
INT8 = ("avx_vnni", "avx512_vnni", "amx_int8")
SETS = {"avx512": ("float32", 1e-5), "avx512_bf16": ("bfloat16", 1e-2), "amx_bf16": ("bfloat16", 1e-2)}
SETS |= dict.fromkeys(INT8, ("int8", 0.04))

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
    precision, bound = SETS[instructions]
    fast = PlannedSSMamba(model, precision, instructions=instructions)
    assert fast.linear_instructions.products == precision
    assert fast.instructions.products == ("float32" if precision == "float32" else "bfloat16")
    # The widest layer's products are long: what bfloat16 rounds adds up.
    bound *= 2 if changes.get("dims", (0,))[-1] == 560 else 1
    for size in ((33, 40), (1, 7)):
        x = images(3, 3, *size)
        for result, wanted in zip(maps(fast, x), maps(model.double(), x.double()), strict=True):
            assert ((result - wanted).norm() / wanted.norm()).item() < bound
        model.float()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16"])
def test_packaged_weights_in_bfloat16(instructions):
    model = timm.create_model("ssmamba_tiny", pretrained=True, num_classes=0).eval()
    x = images(1, 3, 64, 64)
    with torch.inference_mode():
        wanted, result = model(x), PlannedSSMamba(model, "bfloat16", instructions=instructions)(x)
    assert ((result - wanted).norm() / wanted.norm()).item() < 1e-2
    assert torch.cosine_similarity(result, wanted).min().item() > 0.9999


DATA = Path(os.environ.get("SSMAMBA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "lc25000"


def tiles(config, size):
    """Eight tiles of every class's."""
    from PIL import Image

    with open(DATA / "manifest.csv", newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    transform = create_transform(**config, is_training=False)
    return torch.stack([transform(Image.open(DATA / p).convert("RGB")) for p in paths[:: len(paths) // 8]])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("what", ["tiles", "noise"])
@pytest.mark.parametrize(("name", "size"), [("ssmamba_tiny", 96), ("ssmamba_small", 128)])
def test_features_in_int8_keep_their_direction(name, size, what):
    if what == "tiles" and not DATA.is_dir():
        pytest.skip(f"needs the tiles of {DATA}")
    model = timm.create_model(name, pretrained=True, num_classes=0).eval()
    config = resolve_model_data_config(model, {"img_size": size})
    x = tiles(config, size) if what == "tiles" else images(2, 3, size, size)
    with torch.inference_mode():
        wanted, result = model(x), PlannedSSMamba(model, "int8", instructions="avx_vnni")(x)
    assert torch.cosine_similarity(result, wanted).min().item() > 0.999
    # Without what all tiles have in common, too: a head sees the differences.
    if what == "tiles":
        centre = wanted.mean(0)
        assert torch.cosine_similarity(result - centre, wanted - centre).min().item() > 0.999


@pytest.mark.usefixtures("emulated")
def test_the_sets_of_int8_agree_to_the_last_bit():
    """Integer sums are exact, in whatever order; what is around them is the same."""
    model = small(depths=(1, 1, 1, 1), dims=(9, 17, 33, 50))
    x = images(2, 3, 40, 33)
    with torch.inference_mode():
        first, *others = (PlannedSSMamba(model, "int8", instructions=name).forward_features(x) for name in INT8)
    for other in others:
        assert torch.equal(other, first)


@pytest.mark.usefixtures("emulated")
def test_int8_with_odd_inputs():
    model = PlannedSSMamba(small(depths=(1, 1, 1, 1)), "int8")
    assert model.plan == "fused, amx_bf16, amx_int8"
    x = images(3, 3, 40, 33)
    with torch.inference_mode():
        alone = torch.cat([model(image[None]) for image in x])
        assert torch.equal(model(x), alone)
        assert torch.isfinite(model(torch.zeros(1, 3, 8, 8))).all()
        assert model(torch.zeros(0, 3, 8, 8)).shape == (0, alone.shape[1])
        x[1, 0, 5, 5] = torch.nan  # reaches its own image alone
        assert model(x).isnan().any(1).tolist() == [False, True, False]


@pytest.mark.usefixtures("emulated")
@pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning")
def test_provenance_names_int8():
    encoder = load_encoder("test_ssmamba", device="cpu", precision="int8", img_size=32)
    found = encoder.provenance()
    assert (found["dtype"], found["plan"]) == ("int8", "fused, amx_bf16, amx_int8")
    assert encoder.embed(images(2, 3, 32, 32)).shape == (2, encoder.embed_dim)


PRODUCT = """
#include "plan_%s.c"
TARGET("avx2,fma,bmi,bmi2,f16c")
/* out (rows, w->n) = x (rows, w->k) times w. */
void product(const Linear *w, const float *x, int64_t rows, char *scratch, float *out) {
  Arena arena = {scratch, 0};
  const Left a = take_left(&arena, rows, w->k, 0);
  total *c = take_tile(&arena);
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t j = 0; j < w->k; j += LANES) put_part(&a, row, j, x + row * w->k + j, (int)min64(LANES, w->k - j));
    close_row(&a, row, w->k);
  }
  put_no_rows(&a, rows, w->k);
  const Out to = {.data = out, .pitch = w->n, .n = w->n, .dtype = F32};
  multiply_all(&a, rows, w, TO_MAP, &to, c);
}
TARGET_END
"""


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", INT8)
def test_products_of_integers_are_exact(name, tmp_path):
    (tmp_path / "product.c").write_text(PRODUCT % name)
    command = ["gcc", *FLAGS, "-DSSMAMBA_EMULATE", f"-I{SOURCES}", "-shared", "-fPIC", str(tmp_path / "product.c")]
    subprocess.run([*command, "-o", str(tmp_path / "product.so")], check=True, capture_output=True)
    product = ctypes.CDLL(str(tmp_path / "product.so")).product
    instructions = next(s for s in plan.instruction_sets() if s.name == name)
    scratch = torch.full((2**22,), 77, dtype=torch.uint8)  # whatever lies there
    start = -scratch.data_ptr() % 64
    generator = torch.Generator().manual_seed(0)
    for rows, k, n in [(1, 1, 1), (3, 5, 7), (14, 64, 32), (33, 100, 45), (70, 513, 33), (5, 1030, 16)]:
        x, weight = (torch.randint(-127, 128, (m, k), generator=generator) for m in (rows, n))
        x[:, k // 2], weight[:, k // 3] = 127, -127  # the largest: all scales are 1
        floats, packer, out = x.float(), plan.Packer(instructions), torch.empty(rows, n)
        linear = packer.linear(weight.float())
        address = ctypes.c_void_p(scratch.data_ptr() + start)
        product(ctypes.byref(linear), ctypes.c_void_p(floats.data_ptr()), ctypes.c_int64(rows), address,
                ctypes.c_void_p(out.data_ptr()))  # fmt: skip
        assert torch.equal(out.long(), x @ weight.t())
