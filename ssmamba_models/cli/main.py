"""The `ssmamba` command group: finds its sub-commands, and turns errors into messages for a person."""

from __future__ import annotations

import importlib
import select
import sys
from typing import Any

import click

from ssmamba_models._version import __version__
from ssmamba_models.cli.warn import plain_warnings
from ssmamba_models.engine.process_memory import keep_large_blocks
from ssmamba_models.notice import first_line
from ssmamba_models.stopping import stopped_in_order
from ssmamba_models.threads import spin_briefly

# Name -> (module under ssmamba_models.cli, one line of help). A module is imported only when its command runs: what one
# command lacks is no obstacle to the others.
COMMANDS = {
    "list": ("list", "List the models and their sizes."),
    "doctor": ("doctor", "Check this installation and say how to mend it."),
    "extract": ("extract", "Turn whole slides into feature files for MIL."),
    "tile": ("tile", "Cut tiles from whole slides, with a manifest of their places."),
    "convert": ("convert", "Turn feature files of CLAM or TRIDENT into ours, and back."),
    "check": ("check", "Check feature files: shapes, NaN, duplicates, provenance."),
    "mil": ("mil", "Train, predict and draw heatmaps from feature files (MIL)."),
    "embed": ("embed", "Turn a folder of tiles into one HDF5 file of features."),
    "pretrain": ("pretrain", "Pretrain an encoder on your tiles, without labels."),
    "finetune": ("finetune", "Train a classifier on your labelled tiles."),
    "evaluate": ("evaluate", "Score encoders on labelled tiles: probes, kNN, few shots."),
    "slide-pretrain": ("slide_pretrain", "Pretrain a slide encoder on feature files, no labels."),
    "slide-embed": ("slide_embed", "Turn feature files into one file of slide vectors."),
    "slide-evaluate": ("slide_evaluate", "Score slide vectors, from few labels and many."),
    "publish": ("publish", "Put trained weights on the Hugging Face Hub."),
    "demo": ("demo", "Create a model, embed an image and draw what it sees."),
    "benchmark": ("benchmark", "Measure the scans and the models on this machine."),
}

# What the Python API raises for bad input. Anything else is a bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ImportError)
# What a shell expects of a process that SIGINT ended.
_CTRL_C = 130


def _import_command(name: str) -> click.Command:
    try:
        return importlib.import_module(f"ssmamba_models.cli.{COMMANDS[name][0]}").command
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # What torch, torchvision and timm raise where their builds do not fit each other.
        reason = first_line(error)
        raise ImportError(f"`ssmamba {name}` cannot start ({reason}); `ssmamba doctor` names the cure") from error


def _nobody_reads() -> bool:
    """Whether it is our own output that has been closed, not a pipe to another process of ours."""
    try:
        outputs = select.poll()
        for stream in (sys.stdout, sys.stderr):
            outputs.register(stream.fileno(), 0)
        return any(state & select.POLLERR for _, state in outputs.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on Windows; no file behind the stream
        return True


class LazyGroup(click.Group):
    """A click group that imports a sub-command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return _import_command(name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            # A training takes the signal itself: it ends at its next step, with a checkpoint.
            with plain_warnings(), stopped_in_order():
                return super().invoke(ctx)
        except USER_ERRORS as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                raise  # click ends quietly, as `ssmamba doctor | head` should
            message = str(error) or type(error).__name__
            click.echo(f"Error: {message}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            # click would end with 1, which here means that some items failed.
            click.echo("stopped", err=True)
            ctx.exit(_CTRL_C)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ssmamba")
@click.pass_context
def main(ctx: click.Context) -> None:
    """State space models for computational pathology: tiles in, features out.

    \b
    Examples:
      ssmamba demo
      ssmamba extract slides --out job --model ssmamba_small --pretrained
      ssmamba COMMAND --help

    Exit code: 0 done, 1 some items failed (each is listed), 2 bad usage or input, 130 or 143 stopped by Ctrl-C or
    SIGTERM.
    """
    spin_briefly()
    if ctx.invoked_subcommand != "benchmark":  # which says itself what each measurement is to have
        keep_large_blocks()
