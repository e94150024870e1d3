"""Options that several commands share, put on a command all at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ssmamba_models.benchmark.report import write_json
from ssmamba_models.choices import ENCODER_PRECISIONS, POOLS, PRECISIONS
from ssmamba_models.output import check_output
from ssmamba_models.threads import start_with_threads

_STDOUT = Path("-")


def add_options(options: Sequence[Callable], command: Callable) -> Callable:
    """Put click's options on a command, so that its help lists them in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def json_option(command: Callable) -> Callable:
    """--json FILE, as `json_path`; see `write_results`."""
    text = "Write all results here; -: print them, and nothing else."
    return click.option("--json", "json_path", metavar="FILE", type=click.Path(path_type=Path), help=text)(command)


def pool_option(command: Callable) -> Callable:
    """--pool, as `pool`: how an encoder's last maps become a vector."""
    text = "Features: model: its own head's; mean_std: mean and deviation of its last map; _last2, _last4: of more."
    return click.option("--pool", type=click.Choice([*POOLS]), default="model", show_default=True, help=text)(command)


def precision_option(command: Callable) -> Callable:
    """--precision, as `precision`: what a model that is only used computes in."""
    text = "Of the computation; auto: bf16 on GPUs that have it."
    option = click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help=text)
    return option(command)


def threads_option(command: Callable) -> Callable:
    """--threads, as `threads` (see `ssmamba_models.threads.use_threads`)."""
    text = "CPU threads.  [default: the cores that this process may use]"
    option = click.option("--threads", type=click.IntRange(1), callback=_start_with, help=text)
    return option(command)


def _start_with(ctx: click.Context, param: click.Parameter, threads: int | None) -> int | None:
    if threads is not None and not ctx.resilient_parsing:
        start_with_threads(threads)
    return threads


def encoder_precision_option(command: Callable) -> Callable:
    """--precision, as `precision`: what an encoder of tiles computes in."""
    text = "Of the computation; auto: bf16 on GPUs that have it; int8: our models on CPUs that have it."
    choice = click.Choice(ENCODER_PRECISIONS)
    return click.option("--precision", type=choice, default="fp32", show_default=True, help=text)(command)


def check_json(path: Path | None) -> None:
    """Make sure, before a long run, that the file of --json can be written. Results of an earlier run are replaced.

    Raises:
        FileExistsError: the file holds something else than JSON: `--json *.h5` names a file of features.
        OSError: it cannot be written.
    """
    if path is None or path == _STDOUT:
        return
    if check_output(path, overwrite=True).is_file() and not _may_be_json(path):
        raise FileExistsError(f"--json {str(path)!r} exists and is no JSON; it is left as it is: name another file")


def _may_be_json(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(64).lstrip()[:1] in (b"", b"{", b"[")


def is_stdout(path: Path | None) -> bool:
    """Whether --json asks for standard output, which is then left to the JSON."""
    return path == _STDOUT


def write_results(path: Path | None, results: Any) -> bool:
    """Write what --json asks for.

    Returns:
        Whether it went to standard output.

    Raises:
        OSError: the file cannot be written.
    """
    if is_stdout(path):
        click.echo(json.dumps(results, indent=2, allow_nan=False))
    elif path is not None:
        write_json(path, results)
    return is_stdout(path)


def printable(path: str) -> str:
    """A file name as it can be printed: one that is not UTF-8 would break the very message that reports it."""
    return path.encode("utf-8", "backslashreplace").decode()
