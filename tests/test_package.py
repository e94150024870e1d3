"""The package as a whole: what importing it costs, its metadata, its structure, and its build without a compiler."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ssmamba_models

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("h5py", "matplotlib", "sklearn", "scipy", "pandas", "openslide", "tifffile", "triton",
            "mamba_ssm", "selective_scan_cuda", "causal_conv1d")  # fmt: skip


def fresh(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_brings_no_optional_package_and_compiles_nothing(tmp_path):
    """Beyond what torch and timm bring: importing must work, and be quick, where extras are missing."""
    code = f"""
import json, sys, subprocess
import timm
before = set(sys.modules)
started = []
class Refuse(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        started.append(str(args))
        super().__init__(*args, **kwargs)
subprocess.Popen = Refuse
import ssmamba_models
ours = set(sys.modules) - before
print(json.dumps([sorted(n for n in {OPTIONAL!r} if n in ours), started,
                  sorted(n for n in ours if n.startswith(("torch._inductor", "torch._dynamo")))]))
"""
    cache = tmp_path / "cache"
    found, started, compilers = json.loads(
        fresh(code, TORCHINDUCTOR_CACHE_DIR=str(cache), TRITON_CACHE_DIR=str(cache)).strip().splitlines()[-1]
    )
    assert found == []
    assert started == []
    assert compilers == []
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_import_works_where_optional_packages_are_missing():
    code = f"""
import sys
import timm
for name in {OPTIONAL!r}:
    if name not in sys.modules:
        sys.modules[name] = None  # importing it raises ImportError
import ssmamba_models, torch
print(ssmamba_models.create_model("test_ssmamba")(torch.zeros(1, 3, 32, 32)).shape[1])
"""
    assert fresh(code).split() == ["48"]


def test_importing_the_package_is_what_registers_the_models():
    code = """
import timm
assert not timm.is_model("ssmamba_small")
import ssmamba_models
assert timm.is_model("ssmamba_small")
print(type(timm.create_model("ssmamba_small", device="meta")).__name__)
"""
    assert fresh(code).split() == ["SSMamba"]


def test_the_version_is_that_of_the_metadata():
    assert ssmamba_models.__version__ == importlib.metadata.version("ssmamba-models")
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab]|rc|\.dev)?\d*", ssmamba_models.__version__)


def test_what_the_package_offers():
    assert set(ssmamba_models.__all__) == {"__version__", "backends", "create_model", "list_models", "optimize"}
    assert all(hasattr(ssmamba_models, name) for name in ssmamba_models.__all__)


def test_the_command_is_installed():
    (entry,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "ssmamba"]
    assert callable(entry.load())


def test_imports_point_one_way():
    tool = shutil.which("lint-imports", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if tool is None:
        pytest.skip("import-linter is not installed")
    run = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"git does not read this checkout: {run.stderr.strip()}")
    return run.stdout.split("\0")[:-1]


def test_the_top_level_stays_small():
    allowed = {"setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "ssmamba_models", "tests",
               "examples"}  # fmt: skip
    top = {path.split("/")[0] for path in tracked()}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_nothing_built_is_tracked():
    built = [path for path in tracked() if path.endswith((".so", ".pyc", ".o", ".pyd")) or ".egg-info" in path]
    assert built == []


def sources(tmp_path: Path, *without: str) -> Path:
    """A copy of what a package is built from."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed: nothing can be built without a network")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", *without)
    shutil.copytree(ROOT / "ssmamba_models", source / "ssmamba_models", ignore=ignore)
    return source


def build(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess, Path]:
    """A wheel of a copy of the sources, built where there is no working C compiler."""
    if not Path("/bin/false").exists():
        pytest.skip("no command that always fails")
    source, wheels = sources(tmp_path), tmp_path / "wheels"
    environment = {k: v for k, v in os.environ.items() if k != "SSMAMBA_REQUIRE_EXT"} | environment
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, source],
        env=environment | {"CC": "/bin/false"}, capture_output=True, text=True,
    )  # fmt: skip
    return run, wheels


@pytest.mark.slow
def test_without_a_compiler_a_plain_install_works(tmp_path):
    run, wheels = build(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = wheels.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert not [name for name in names if name.endswith((".so", ".pyd"))]
        assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ssmamba_models"}
        assert {"ssmamba_models/py.typed", "ssmamba_models/weights/ssmamba_tiny.mamim_lc25000.safetensors"} <= names
        archive.extractall(installed)
    code = """
import warnings, torch, ssmamba_models
from pathlib import Path
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = ssmamba_models.create_model("test_ssmamba")(torch.zeros(1, 3, 32, 32))
ours = [w for w in caught if "install a C compiler" in str(w.message)]
report = ssmamba_models.backends()
print(Path(ssmamba_models.__file__).parents[1], y.shape[1], len(ours), report["backends"]["c"]["available"])
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(installed), "SSMAMBA_BACKEND": ""},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(installed), "48", "1", "False"]


@pytest.mark.slow
def test_the_sdist_holds_the_sources_and_no_tests(tmp_path):
    source = sources(tmp_path, "*.safetensors")  # which take seconds to compress
    (source / "tests").mkdir()
    shutil.copy(__file__, source / "tests")
    run = subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if name.startswith("tests")]
    assert {"CHANGELOG.md", "LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= names
    assert {f"ssmamba_models/ops/cpu/{path.name}" for path in (ROOT / "ssmamba_models/ops/cpu").glob("*.[ch]")} <= names
    assert {"ssmamba_models/py.typed", "ssmamba_models/weights/ssmamba_tiny.mamim_lc25000.yaml"} <= names


@pytest.mark.slow
def test_without_a_compiler_a_required_extension_is_an_error(tmp_path):
    run, wheels = build(tmp_path, SSMAMBA_REQUIRE_EXT="1")
    assert run.returncode != 0
    assert "/bin/false" in run.stdout + run.stderr  # failed for this reason, not for another
    assert not list(wheels.glob("*.whl"))
