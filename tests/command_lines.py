"""Command lines that stand in texts: found, taken apart, and parsed by the commands that they name."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ssmamba_models.cli.main import main

ROOT = Path(__file__).resolve().parents[1]


def command_lines(text: str) -> list[list[str]]:
    """The commands of a shell text, each as its words; comments go, continued and &&-joined lines are told apart."""
    text = text.replace("\\\n", " ").replace("$(which ssmamba)", "ssmamba")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    found: list[list[str]] = []
    for words in filter(None, lines):
        rest = words
        while "&&" in rest:
            at = rest.index("&&")
            found.append(rest[:at])
            rest = rest[at + 1 :]
        found.append(rest)
    return found


def sub_command(words: list[str]) -> tuple[str, click.Command, list[str]]:
    """The sub-command that `ssmamba WORDS` names, itself, and the words that are left for it.

    Raises:
        AssertionError: there is no such sub-command.
    """
    command, path, rest = main, [], list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, f"`ssmamba {' '.join(words)}`: there is no command {rest[0]!r}"
        command, path, rest = found, [*path, rest[0]], rest[1:]
    return " ".join(path), command, rest


def all_commands() -> list[tuple[str, click.Command]]:
    """Every command with its words, such as "mil train"; groups, "" itself among them, go before what they hold."""
    return list(_walk(main, ()))


def _walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    yield " ".join(path), command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from _walk(command.get_command(context, name), (*path, name))


def check_line(words: list[str], complete: bool = True) -> None:
    """Parse a command without running it.

    Args:
        words: the command's words.
        complete: whether what a command requires must be there; a mere mention in a text may leave it out.

    Raises:
        AssertionError: the command, a sub-command, an option, an extra, a module or a file is not there, or a value is
            not one that the option takes.
    """
    check = _CHECKS.get(words[0])
    assert check is not None, f"`{' '.join(words)}`: no way to check the command {words[0]!r}; add one"
    check(words[1:], complete)


def _check_ssmamba(words: list[str], complete: bool) -> None:
    path, command, rest = sub_command(words)
    if isinstance(command, click.Group):
        assert not [word for word in rest if word.startswith("-") and word not in ("--help", "--version")]
        return
    try:
        command.make_context(f"ssmamba {path}", rest)
    except click.ClickException as error:
        if complete or not isinstance(error, click.MissingParameter):
            raise AssertionError(f"`ssmamba {' '.join(words)}`: {error.format_message()}") from error


def _check_pip(words: list[str], complete: bool) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert words[0] == "install"
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(setup["options.extras_require"]), f"there is no extra {extras}"


def _check_accelerate(words: list[str], complete: bool) -> None:
    pytest.importorskip("accelerate", reason="`accelerate launch` needs the [train] extra")
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    arguments = launch_command_parser().parse_args(words[1:])
    if arguments.module:
        assert importlib.util.find_spec(arguments.training_script) is not None
    else:
        assert arguments.training_script == "ssmamba"
    _check_ssmamba([word for word in arguments.training_script_args if word != "..."], complete)


def _check_files(words: list[str], complete: bool) -> None:
    missing = [word for word in words if "/" in word and not (ROOT / word).exists()]
    assert missing == []


_CHECKS = {
    "ssmamba": _check_ssmamba,
    "pip": _check_pip,
    "accelerate": _check_accelerate,
    "pytest": _check_files,
    "sbatch": _check_files,
}
