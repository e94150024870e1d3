"""Which packages are there, whether they import, and whether they fit each other."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterable

from ssmamba_models._version import __version__
from ssmamba_models.cli.checks.finding import Finding
from ssmamba_models.cli.checks.probe import Probe
from ssmamba_models.notice import first_line

_SUBJECT = "packages"

# In the order in which they build on one another: the first that fails explains the rest.
CORE = (
    "numpy",
    "PIL",
    "safetensors",
    "huggingface_hub",
    "einops",
    "torch",
    "torchvision",
    "timm",
    "ssmamba_models.models",
)
# What setup.cfg asks for.
MINIMUM = {"torch": (2, 6), "timm": (1, 0, 26)}
# Import name -> the extra that brings it.
OPTIONAL = {
    "h5py": "wsi",
    "openslide": "wsi",
    "tifffile": "wsi",
    "imagecodecs": "wsi",
    "scipy": "wsi",
    "sklearn": "eval",
    "matplotlib": "eval",
    "yaml": "train",
}
# The same, of packages that are not imported: they take long, or import torch and then say what it has said.
UNTRIED = {
    "accelerate": "train",
    "torchmetrics": "train",
    "tensorboard": "train",
    "torchmil": "mil",
    "ray": "cluster",
}

# Run by a probe, with the names as arguments.
IMPORT_EACH = """
import importlib
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        report(name=name, missing=error.name == name, error=str(error))
    except BaseException as error:
        report(name=name, missing=False, error=f"{type(error).__name__}: {error}")
    else:
        report(name=name, version=str(getattr(module, "__version__", "")))
"""


def check_packages(core: Probe, optional: Probe) -> list[Finding]:
    """Judge what `IMPORT_EACH` found.

    Args:
        core: the probe that imported `CORE`.
        optional: the probe that imported `OPTIONAL`.

    Returns:
        One finding for Python, for each package, and for torch and torchvision as a pair.
    """
    return [
        _python(),
        *_core_findings(core),
        *_torch_pair(),
        *_optional_findings(optional),
        _triton(),
    ]


def _python() -> Finding:
    text = f"{platform.python_version()} ({sys.executable}), ssmamba_models {__version__}"
    return Finding(_SUBJECT, "python", "ok", text)


def _core_findings(probe: Probe) -> list[Finding]:
    findings, broken = [], ""
    results = _results(probe, CORE)
    for name in CORE:
        if broken and "error" in results[name]:
            text = f"does not import either, after {broken} failed"
            findings.append(Finding(_SUBJECT, name, "problem", text, f"mend {broken} first"))
            continue
        findings.append(_core_finding(name, results[name]))
        if findings[-1].status == "problem":
            broken = name
    return findings


def _results(probe: Probe, names: Iterable[str]) -> dict[str, dict]:
    results = {fact["name"]: fact for fact in probe.facts if "name" in fact}
    for name in names:
        # Without a result: the process ended in this import, or before it came to it.
        results.setdefault(name, {"error": probe.failure or "no answer", "missing": False})
    return results


def _core_finding(name: str, result: dict) -> Finding:
    if "error" in result:
        text = first_line(result["error"])
        return Finding(_SUBJECT, name, "problem", text, _core_cure(name, result))
    version = result["version"] or _installed_version(name) or "imports"
    if name in MINIMUM and _numbers(version) < MINIMUM[name]:
        least = ".".join(map(str, MINIMUM[name]))
        cure = f'pip install --upgrade "{name}>={least}"'
        return Finding(_SUBJECT, name, "problem", f"{version}, older than {least}", cure)
    return Finding(_SUBJECT, name, "ok", version)


def _core_cure(name: str, result: dict) -> str:
    distribution = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}.get(name, name)
    if name == "ssmamba_models.models":
        return "the message above names the cause; if it does not, report it with this output"
    if name == "torchvision":
        return _matching_pair_cure()
    if result["missing"]:
        return f"pip install {distribution}"
    return f"pip install --force-reinstall {distribution}"


def _torch_pair() -> list[Finding]:
    """Whether torchvision is the build made for this torch: its operators fit one version alone."""
    if any(_installed_version(name) == "" for name in ("torch", "torchvision")):
        return []
    torch, vision = _installed_version("torch"), _installed_version("torchvision")
    pins = [re.match(r"torch\s*==\s*([\d.]+)", need) for need in _requirements("torchvision")]
    wanted = next((pin.group(1) for pin in pins if pin), torch.split("+")[0])
    if _numbers(wanted) != _numbers(torch):
        text = f"torchvision {vision} was built for torch {wanted}, but torch is {torch}"
        return [Finding(_SUBJECT, "torch + torchvision", "problem", text, _matching_pair_cure())]
    builds = [version.partition("+")[2] for version in (torch, vision)]
    if all(builds) and builds[0] != builds[1]:
        text = f"torch is built for {builds[0]}, torchvision for {builds[1]}"
        return [Finding(_SUBJECT, "torch + torchvision", "problem", text, _matching_pair_cure())]
    return [Finding(_SUBJECT, "torch + torchvision", "ok", "built for each other")]


def _matching_pair_cure() -> str:
    build = _installed_version("torch").partition("+")[2]
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"install both from one place: pip install --force-reinstall torch torchvision{index}"


def _optional_findings(probe: Probe) -> list[Finding]:
    results = _results(probe, OPTIONAL)
    tried = [_optional_finding(name, extra, results[name]) for name, extra in OPTIONAL.items()]
    return tried + [_untried_finding(name, extra) for name, extra in UNTRIED.items()]


def _optional_finding(name: str, extra: str, result: dict) -> Finding:
    cure = f'pip install "ssmamba-models[{extra}]"'
    if "error" not in result:
        return Finding(_SUBJECT, name, "ok", result["version"] or _installed_version(name))
    if result["missing"]:
        return Finding(_SUBJECT, name, "ok", "not installed (optional)", cure)
    return Finding(_SUBJECT, name, "warning", f"does not import: {first_line(result['error'])}", cure)


def _untried_finding(name: str, extra: str) -> Finding:
    version = _installed_version(name)
    if version:
        return Finding(_SUBJECT, name, "ok", version)
    return Finding(_SUBJECT, name, "ok", "not installed (optional)", f'pip install "ssmamba-models[{extra}]"')


def _triton() -> Finding:
    version = _installed_version("triton")
    return Finding(_SUBJECT, "triton", "ok", version or "not installed (optional; for GPU kernels)")


def _installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _requirements(name: str) -> list[str]:
    return importlib.metadata.requires(name) or []


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])
