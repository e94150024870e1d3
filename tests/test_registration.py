"""Models and operators are registered with whoever imports timm or torch, however that comes about."""

from __future__ import annotations

import subprocess
import sys

import pytest

ASKED_BEFORE = "import importlib.util as u; u.find_spec('timm'); u.find_spec('torch'); u.find_spec('timm')"
FAILED_BEFORE = """
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            raise ImportError("broken")
broken = Broken()
sys.meta_path.insert(0, broken)
try:
    import timm
except ImportError:
    pass
sys.meta_path.remove(broken)
for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
    del sys.modules[name]
"""
WAYS = {
    "asked for before": ASKED_BEFORE,
    "package reloaded": "import importlib; importlib.reload(ssmamba_models)",
    "package imported twice": "del sys.modules['ssmamba_models']; import ssmamba_models",
    "failed before": FAILED_BEFORE,
}


@pytest.mark.parametrize("way", WAYS)
def test_timm_and_torch_know_ours(way):
    code = f"import sys, ssmamba_models\n{WAYS[way]}\nimport torch, timm\n"
    code += "assert timm.is_model('test_ssmamba')\ntorch.ops.ssmamba.selective_scan\n"
    code += "assert not any(type(hook).__module__.startswith('ssmamba') for hook in sys.meta_path)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
