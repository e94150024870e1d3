"""One way of doing things: what the help of every command shows, and how every command takes bad input."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import click
import pytest
from command_lines import all_commands, check_line, command_lines

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = dict(all_commands())
LEAVES = [name for name, command in COMMANDS.items() if not isinstance(command, click.Group)]
# Input that is not there, or cannot be: sub-command -> arguments.
BAD = {
    "list": ["no_such_model"],
    "doctor": ["--json", "nowhere/report.json"],
    "extract": ["nowhere", "--out", "job", "--model", "test_ssmamba"],
    "tile": ["nowhere", "--out", "tiles"],
    "convert": ["nowhere", "--from", "clam", "--to", "ssmamba", "--out", "out"],
    "check": ["nowhere"],
    "mil train": ["--features", "nowhere", "--labels", "labels.csv", "--out", "run"],
    "mil predict": ["nowhere", "--features", "nowhere", "--out", "p.csv"],
    "mil heatmap": ["nowhere", "--features", "a.h5", "--out", "maps"],
    "embed": ["nowhere", "--out", "f.h5", "--model", "test_ssmamba"],
    "pretrain": ["--data", "nowhere", "--out", "run"],
    "finetune": ["--data", "nowhere", "--out", "run"],
    "evaluate": ["--data", "nowhere", "--model", "test_ssmamba@none", "--out", "report"],
    "slide-pretrain": ["--features", "nowhere", "--out", "run"],
    "slide-embed": ["--run", "nowhere", "--features", "nowhere", "--out", "v.h5"],
    "slide-evaluate": ["--embeddings", "nowhere.h5", "--labels", "labels.csv", "--out", "report"],
    "publish": ["nowhere", "--repo-id", "lab/model", "--dry-run", "card"],
    "demo": ["nowhere.png", "--model", "test_ssmamba"],
    "benchmark ops": ["--json", "nowhere/ops.json"],
    "benchmark models": ["--json", "nowhere/models.json"],
    "benchmark train": ["--json", "nowhere/train.json"],
    "benchmark extract": ["--json", "nowhere/extract.json"],
    "benchmark sgcl": ["--json", "nowhere/sgcl.json"],
    "benchmark all": ["--json", "nowhere/all.json"],
}
# One name, one meaning: option -> what it must be wherever it is.
SAME = {
    "--out": "path",
    "--model": "text",
    "--data": "path",
    "--features": "path",
    "--labels": "path",
    "--device": "text",
    "--batch-size": "integer",
    "--workers": "integer",
    "--seed": "integer",
    "--img-size": "integer",
    "--json": "path",
    "--config": "path",
    "--set": "text",
    "--resume": "flag",
    "--overwrite": "flag",
    "--quiet": "flag",
    "--threads": "integer",
    "--precision": "choice",
}
# What must not come back as another name for the same.
OLD = {
    *("--output", "--input", "--bs", "--num-workers", "--verbose", "--force", "--gpu", "--yaml", "--no-progress"),
    *("--bf16", "--fp16", "--amp"),
}


@pytest.fixture
def show(ssmamba):
    def show(name):
        result = ssmamba(*name.split(), "--help")
        assert result.exit_code == 0
        return result.output

    return show


def kind(option: click.Parameter) -> str:
    name = "flag" if getattr(option, "is_flag", False) else option.type.name
    return name.removesuffix(" range")


@pytest.mark.parametrize("name", COMMANDS, ids=lambda name: name or "ssmamba")
class TestHelp:
    def test_it_reads_well_in_80_columns(self, show, name):
        lines = show(name).splitlines()
        assert [line for line in lines if len(line) > 80] == []
        summary, after = lines[2], lines[3]
        assert summary.endswith(".")
        assert after == "", f"the summary takes more than a line: {summary} {after}"

    def test_it_has_an_example_that_parses(self, show, name):
        text = show(name)
        (examples,) = re.findall(r"^  Examples?:\n((?:    .*\n)+)", text, re.MULTILINE)
        lines = command_lines(examples)
        assert any(" ".join(words).startswith(f"ssmamba {name}".strip()) for words in lines)
        for words in lines:
            if words != ["ssmamba", "COMMAND", "--help"]:
                check_line(words)

    def test_every_option_is_explained(self, name):
        options = [item for item in COMMANDS[name].params if isinstance(item, click.Option)]
        assert [item.opts[0] for item in options if not item.help] == []


def test_the_list_of_commands_has_a_line_for_each(show):
    lines = show("").split("Commands:\n")[1].splitlines()
    assert len(lines) == len([name for name in COMMANDS if name and " " not in name])


@pytest.mark.parametrize("name", LEAVES)
def test_the_help_tells_the_exit_codes(show, name):
    text = " ".join(show(name).split())
    (codes,) = re.findall(r"Exit code: (.*?)\. Options:|Exit code: (.*?)\. ", text)[:1]
    assert re.match(r"0 .*2 bad input", "".join(codes))


@pytest.mark.parametrize("name", LEAVES)
def test_options_of_one_name_are_of_one_kind(name):
    for item in COMMANDS[name].params:
        for option in item.opts:
            assert option not in OLD
            if option in SAME:
                assert kind(item) == SAME[option], f"{option} of `ssmamba {name}` is {kind(item)}"


@pytest.mark.parametrize("name", LEAVES)
def test_bad_input_is_one_plain_line_and_exit_code_2(ssmamba, monkeypatch, tmp_path, name):
    assert name in BAD, f"say in BAD what bad input to `ssmamba {name}` is"
    monkeypatch.chdir(tmp_path)
    result = ssmamba(*name.split(), *BAD[name])
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert [line for line in lines[:-1] if not line.startswith("Warning: ")] == []
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LEAVES)
def test_bad_usage_is_exit_code_2_with_a_hint(ssmamba, name):
    result = ssmamba(*name.split(), "--no-such-option")
    assert result.exit_code == 2
    assert "--help" in result.stderr
    assert "No such option" in result.stderr
    assert "Traceback" not in result.stderr


_WITHOUT = """
import sys
from ssmamba_models.cli.main import main
code = 0
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = {"torch", "torchvision", "timm", "numpy", "PIL", "h5py", "scipy", "sklearn"} & set(sys.modules)
sys.exit(f"loaded {sorted(heavy)}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        *(([*name.split(), "--help"], 0) for name in COMMANDS),
        *(([*name.split(), "--no-such-option"], 2) for name in LEAVES),
        (["--version"], 0),
        (["no-such-command"], 2),
        (["extract"], 2),
        (["embed", "tiles", "--out", "f.h5", "--threads", "0"], 2),
        (["finetune", "--out", "run", "--precision", "int1"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_help_and_errors_of_usage_do_not_wait_for_torch(arguments, code):
    run = subprocess.run([sys.executable, "-c", _WITHOUT, *arguments], capture_output=True, text=True)
    assert run.returncode == code, run.stderr


def test_what_computes_takes_a_number_of_threads():
    flags = {name: {flag for item in COMMANDS[name].params for flag in item.opts} for name in LEAVES}
    without = {name for name in LEAVES if "--threads" not in flags[name]}
    assert without == {"list", "doctor", "convert", "check", "publish"}


def test_names_in_the_help_are_those_that_there_are():
    from ssmamba_models import choices
    from ssmamba_models.benchmark import defaults, op_cases, ops
    from ssmamba_models.engine.methods import METHODS
    from ssmamba_models.engine.slide_methods import SLIDE_METHODS

    assert sorted(choices.METHODS) == sorted(METHODS)
    assert sorted(choices.SLIDE_METHODS) == sorted(SLIDE_METHODS)
    assert set(defaults.OPS) == {case.op for case in op_cases.CASES}
    assert tuple(ops.DTYPES) == defaults.OP_DTYPES


def test_version(ssmamba):
    from ssmamba_models import __version__

    assert ssmamba("--version").stdout == f"ssmamba, version {__version__}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes as Unix has them")
@pytest.mark.parametrize("arguments", [["list"], ["doctor"], ["--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(arguments):
    """As in `ssmamba doctor | head -1`, with a reader that is gone before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "-m", "ssmamba_models", *arguments], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert run.stderr == b""
    assert run.returncode == 1


def test_what_the_package_warns_of_is_one_line(tmp_path):
    code = (
        "from ssmamba_models.ops.cpu import library\n"
        "library.open_library = lambda: (None, 'they were never built')\n"
        "from ssmamba_models.cli.main import main\n"
        f"main(['demo', '--model', 'test_ssmamba', '--img-size', '64', '--out', {str(tmp_path / 'demo.png')!r}])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0
    lines = run.stderr.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["Warning:", "Warning:"]
    assert "random weights" in lines[0]
    assert "they were never built" in lines[1]


def test_ctrl_c_is_not_taken_for_items_that_failed(ssmamba, monkeypatch):
    from ssmamba_models.engine import embed

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(embed, "embed_folder", stop)
    result = ssmamba("embed", "tiles", "--out", "f.h5")
    assert (result.exit_code, result.output) == (130, "stopped\n")
