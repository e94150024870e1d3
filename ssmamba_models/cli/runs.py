"""What the commands that train share: where their settings come from, and how a run ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssmamba_models.choices import PRECISIONS
from ssmamba_models.cli.options import add_options, threads_option
from ssmamba_models.engine.config import Config, load_config, parse_setting

if TYPE_CHECKING:
    from ssmamba_models.engine.loop import TrainResult

_CONFIGURED = (
    click.option("--out", required=True, type=click.Path(), help="Run folder to write."),
    click.option(
        "--config", "config_file", type=click.Path(), help="YAML of settings, such as another run's config.yaml."
    ),
)
_RUN = (
    click.option("--accumulate", type=int, help="Cut a batch into so many parts, to need less memory. Default: 1."),
    click.option("--ema-decay", type=float, help="Keep and export an average of the weights with this decay."),
    click.option(
        "--precision", type=click.Choice(PRECISIONS), help="Default: bf16 on GPUs that have it."
    ),
    click.option("--seed", type=int, help="Seed of all that is drawn. Default: 0."),
    click.option("--workers", type=int, help="Processes that read the data; 0: none. Default: by the machine."),
    threads_option,
    click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU where there is one."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting; may be repeated."),
    click.option("--resume", is_flag=True, help="Go on with the run in --out (started if there is none)."),
    click.option("--quiet", is_flag=True, help="No progress bar and no closing line."),
)


def configured(command: Callable) -> Callable:
    """--out and --config."""
    return add_options(_CONFIGURED, command)


def run_options(command: Callable) -> Callable:
    """What every training on the engine's loop takes (see `LoopConfig`)."""
    return add_options(_RUN, command)


def read_config(
    cls: type[Config],
    config_file: str | None,
    out: str,
    resume: bool,
    settings: Sequence[str],
    options: Mapping[str, Any],
) -> Config:
    """Settings from --config (or the run that is resumed), then --set, then the options that were given.

    Raises:
        ValueError, OSError, ImportError: as `load_config` and `parse_setting`.
    """
    overrides = dict(map(parse_setting, settings))
    overrides |= {key: value for key, value in options.items() if value not in (None, ())}
    if options.get("classes"):
        names = [name.strip() for text in options["classes"] for name in text.split(",")]
        overrides["classes"] = tuple(name for name in names if name)
    saved = Path(out) / "config.yaml"
    source = saved if config_file is None and resume and saved.exists() else config_file
    try:
        return load_config(cls, source, overrides)
    except ValueError as error:
        if source is None and resume:
            raise ValueError(f"there is no run in {out!r} to go on with, and to begin one, {error}") from error
        raise


def report_end(result: TrainResult, closing: str, quiet: bool) -> None:
    """Say how a run ended; `closing` is the line of one that came to its end."""
    if result.unreadable:
        count = len(result.unreadable)
        replaced = f"1 {result.noun} was" if count == 1 else f"{count} {result.noun}s were"
        click.echo(f"{replaced} unreadable and replaced by others; log.jsonl names them", err=True)
    if result.stopped_by is not None:
        click.echo(
            f"stopped after step {result.step} of {result.steps}, with a checkpoint; go on with --resume", err=True
        )
    elif not quiet:
        click.echo(closing)


def exit_code(result: TrainResult) -> int:
    """0, or what a shell expects of a process that a signal ended."""
    return 0 if result.stopped_by is None else 128 + result.stopped_by
