"""README cannot rot: every block of code runs, every command that it mentions parses, every file is there.

Blocks run as they stand, one after another in one folder that holds the inputs they name, but for what SMALLER and
QUICK say: models that take seconds, and options that cut a training short.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_lines import ROOT, check_line, command_lines, sub_command

from ssmamba_models import __version__
from ssmamba_models.data.synthetic import synthetic_he, write_synthetic_tiles

for package in ("accelerate", "tensorboard", "h5py", "openslide", "sklearn", "matplotlib", "torchmil"):
    pytest.importorskip(package, reason="README's commands need the [all] extra")
tifffile = pytest.importorskip("tifffile", reason="README's commands need the [all] extra")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

README = (ROOT / "README.md").read_text(encoding="utf-8")

# What a line says -> what runs in its place.
SMALLER = {
    "ssmamba_small": "test_ssmamba",
    "ssmamba_tiny": "test_ssmamba",
    "resnet18": "test_resnet",
    "--pretrained": "",  # test_ssmamba has no trained weights
    "--shared-aug 50": "--shared-aug 2 --shared-aug-tiles 4",
}
_TRAINING = "--epochs 1 --batch-size 4 --workers 0"
# Sub-command -> options that are added. A command of README that is not here fails: say how it runs in seconds.
QUICK = {
    "demo": "",
    "doctor": "",
    "pretrain": f"{_TRAINING} --img-size 64",
    "finetune": f"{_TRAINING} --img-size 64",
    "evaluate": "--folds 2 --seeds 1 --img-size 64 --workers 0",
    "tile": "--tile-size 112 --workers 0",
    "extract": "--workers 0",
    "check": "",
    "mil train": "--folds 2 --epochs 1 --draws 10",
    "mil heatmap": "--max-size 200",
    "slide-pretrain": f"{_TRAINING} --model test_gigassl",
    "slide-embed": "--views 2",
    "slide-evaluate": "--folds 2 --repeats 1 --draws 10 --budgets all",
    "publish": "",
}
# Commands of which README's text is checked and nothing runs: they change the environment, or need other machines.
ONLY_PARSED = ("pip", "pytest", "accelerate", "sbatch")


def blocks(language: str) -> list[tuple[str, str]]:
    """(heading above it, text) of each fenced block of a language."""
    found, heading = [], ""
    for part in re.finditer(r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        if part[1] is not None:
            heading = part[1]
        elif part[2] == language:
            found.append((heading, part[3]))
    return found


SHELL, PYTHON = blocks("sh"), blocks("python")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What README's commands are given: tiles/, slides/ and labels.csv; not to be written in."""
    root = tmp_path_factory.mktemp("readme")
    write_synthetic_tiles(root / "tiles", tiles_per_kind=4, size=64)
    (root / "slides").mkdir()
    rows = ["slide,label,patient"]
    resolution = {"resolution": (20_000, 20_000), "resolutionunit": 3}  # 0.5 um per px
    for number, name in enumerate("abcdefgh"):
        image = np.asarray(synthetic_he((448, 448), seed=number, kind=("glands", "solid")[number % 2]))
        # The content of a file decides, not its suffix.
        tifffile.imwrite(root / "slides" / f"{name}.svs", image, tile=(256, 256), photometric="rgb", **resolution)
        rows.append(f"{name},{('normal', 'tumour')[number % 2]},{name}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def run(ssmamba, inputs, tmp_path):
    """A run folder of `ssmamba pretrain`, which README's Python blocks speak of."""
    options = ("--model", "test_ssmamba", *QUICK["pretrain"].split())
    made = ssmamba("pretrain", "--data", inputs / "tiles", "--out", tmp_path / "run", *options)
    assert made.exit_code == 0, made.output
    return tmp_path / "run"


def quick(words: list[str]) -> list[str]:
    """The words of an `ssmamba` command as they are run."""
    text = "\0".join(words)
    for said, instead in SMALLER.items():
        text = text.replace(said.replace(" ", "\0"), instead.replace(" ", "\0"))
    name, _, _ = sub_command(words)
    assert name in QUICK, f"README runs `ssmamba {name}`, and QUICK has no plan for it"
    return [word for word in text.split("\0") if word] + QUICK[name].split()


def test_shell_blocks_run_in_order(inputs, ssmamba, monkeypatch, tmp_path):
    """In one folder, as a reader who types one after another: none may stand in another's way."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for heading, text in SHELL:
        for words in command_lines(text):
            check_line(words)
            if words[0] in ONLY_PARSED:
                continue
            result = ssmamba(*quick(words[1:]))
            assert result.exit_code == 0, f"{heading}: `{' '.join(words)}`: {result.output}"
            for option in ("--out", "--dry-run"):
                if option in words:
                    made = quick(words[1:])[words.index(option)]
                    assert Path(made).exists(), f"`{' '.join(words)}` made no {made}"


def test_python_blocks_run_in_order(run, ssmamba, tmp_path):
    """In a fresh Python, in one namespace, as a reader who pastes them one after another."""
    made = ssmamba("publish", run, "--repo-id", "my-lab/my-model", "--dry-run", tmp_path / "card")
    assert made.exit_code == 0, made.output
    code = "\n".join(text for _, text in PYTHON)
    assert "hf-hub:my-lab/my-model" in code
    code = code.replace("hf-hub:my-lab/my-model", f"local-dir:{tmp_path / 'card'}")  # the Hub is not to be had
    code += "\nassert features.shape == (1, 384)\n"
    command = [sys.executable, "-W", "error::UserWarning:__main__", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    comment = re.search(r"print\(\[tuple.*\n# (.+)", code)[1]
    assert comment in done.stdout


def test_no_block_is_of_an_unknown_kind():
    kinds = set(re.findall(r"^```(\w+)$", README, re.MULTILINE))
    assert kinds <= {"sh", "python", "bibtex", "yaml"}


def test_commands_in_the_text_parse():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]
    lines = [span for span in spans if re.match(r"(ssmamba|pip|accelerate|pytest|sbatch) ", span)]
    assert len(lines) > 20
    for line in lines:
        check_line(re.sub(r"[\[\]]", "", line).split() if line.startswith("ssmamba") else line.split(), complete=False)


def test_options_in_the_text_exist():
    """Options that stand alone, such as `--resume`, belong to some command."""
    from command_lines import all_commands

    known = {option for _, command in all_commands() for item in command.params for option in item.opts}
    spans = re.findall(r"`(--[\w-]+)[^`]*`", README)
    assert sorted(set(spans) - known - {"--help"}) == []


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert missing == []
    named = re.findall(r"`(examples/[\w./]+)`", README)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_python_names_in_the_text_exist():
    import importlib

    for dotted in set(re.findall(r"`(ssmamba_models(?:\.\w+)+)[(`]", README)):
        module, _, name = dotted.rpartition(".")
        assert hasattr(importlib.import_module(module), name), dotted


def test_the_version_is_the_same_everywhere():
    import yaml

    (cff,) = [text for _, text in blocks("yaml")]
    assert yaml.safe_load(cff)["version"] == __version__
    (bibtex,) = [text for _, text in blocks("bibtex")]
    assert f"version = {{{__version__}}}" in bibtex
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\S+)", changelog, re.MULTILINE)
    assert next(name for name in sections if name != "Unreleased") == __version__
