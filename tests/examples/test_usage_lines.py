"""The lines of use in the docstrings of the examples parse, and README of the examples lists them all."""

import argparse
import ast
import importlib.util
import re
import sys

import pytest
from command_lines import ROOT, check_line, command_lines

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def usage_lines(name):
    """The words of each `python examples/NAME.py ...` of a docstring; brackets and choices of a kind are opened."""
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    text = "\n".join(part.split("\n\n")[0] for part in re.findall(r"^(python .*(?:\n.+)*)", text, re.MULTILINE))
    return [words[1:] for words in command_lines(re.sub(r"[\[\]]", "", text)) if words[0] == "python"]


class Parsed(Exception):
    """Ends an example when its options are parsed."""


def parse(name, words, monkeypatch):
    """Parse a line by the example's own parser."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *rest):
        original(self, *rest)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(Parsed):
        module.main()


@pytest.mark.parametrize("name", SCRIPTS)
def test_lines_of_use_parse(name, monkeypatch, capsys):
    lines = usage_lines(name)
    assert lines, f"the docstring of examples/{name}.py shows no line of use"
    for script, *words in lines:
        assert script == f"examples/{name}.py"
        try:
            parse(name, words, monkeypatch)
        except SystemExit:
            pytest.fail(f"`{script} {' '.join(words)}`: {capsys.readouterr().err.splitlines()[-1]}")


def test_the_readme_of_the_examples_lists_them_all():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(([\w.]+)\)", text)
    scripts = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")]
    assert sorted(listed) == sorted(scripts)
    for line in re.findall(r"`((?:ssmamba|sbatch) [^`]+)`", text):
        check_line(line.split(), complete=False)


def test_commands_in_docstrings_of_examples_parse():
    for name in SCRIPTS:
        text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
        for line in re.findall(r"`(ssmamba [^`]+)`", text):
            check_line(line.split(), complete=False)


def test_the_slurm_script_calls_a_command_that_exists():
    text = (EXAMPLES / "extract_slurm.sh").read_text(encoding="utf-8")
    (line,) = re.findall(r"^exec (ssmamba .*\\\n.*)$", text, re.MULTILINE)
    line = re.sub(r'"\$\{@:3\}"', "", line).replace("${SLURM_CPUS_PER_TASK:-4}", "4")
    (words,) = command_lines(line)
    check_line(words)
