"""The example of a round trip: the features that come back are those that went."""

import importlib.util
import sys
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "hub_roundtrip.py"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        spec = importlib.util.spec_from_file_location("hub_roundtrip", EXAMPLE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["hub_roundtrip.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return run


def test_without_weights(run):
    out = run("--model", "test_ssmamba")
    assert "model.safetensors" in out
    assert "features (1, 48), largest difference 0\n" in out


def test_with_weights_of_a_classifier_at_another_size(run, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(timm.create_model("test_ssmamba", num_classes=3).state_dict(), path, {"img_size": "64"})
    out = run(path, "--model", "test_ssmamba", "--out", tmp_path / "kept")
    assert "features (1, 48), largest difference 0\n" in out
    assert (tmp_path / "kept" / "README.md").exists()
