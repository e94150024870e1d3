"""What commands share that turn slides into a job folder: options of one name and meaning, and how slides ended."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from ssmamba_models.cli.options import add_options, threads_option
from ssmamba_models.notice import SSMambaWarning

if TYPE_CHECKING:
    from ssmamba_models.wsi.dry_run import PlannedSlide
    from ssmamba_models.wsi.job_run import JobResult

_PLACES = (
    click.argument("slides", nargs=-1, required=True, type=click.Path()),
    click.option("--out", required=True, type=click.Path(), help="Job folder; made, or gone on with."),
)
_TILING = (
    click.option("--mpp", type=float, default=0.5, show_default=True, help="Micrometres per pixel of the tiles."),
    click.option(
        "--tile-size", type=click.IntRange(1), default=224, show_default=True, help="Side of a tile, px at --mpp."
    ),
    click.option("--overlap", type=click.IntRange(0), default=0, show_default=True, help="Px that neighbours share."),
    click.option("--min-tissue", type=float, default=0.25, show_default=True, help="Least share of tissue in a tile."),
    click.option("--mpp-override", type=float, help="Micrometres per level-0 pixel, instead of what the slides say."),
    click.option("--mpp-csv", type=click.Path(), help="That of single slides, which goes first: a CSV, slide,mpp."),
    click.option(
        "--max-bad-tiles", type=float, default=0.05, show_default=True, help="Share above which a slide fails."
    ),
)
_JOB = (
    click.option("--retry-failed", is_flag=True, help="Try slides again that failed."),
    click.option(
        "--workers", type=click.IntRange(0), help="Processes that read tiles; 0: none. Default: by the machine."
    ),
    threads_option,
    click.option(
        "--shard", metavar="i/n", help="Begin with the i-th of n shares. Default: a SLURM array's own numbers."
    ),
    click.option("--quiet", is_flag=True, help="No progress bar and no closing lines."),
)


def places(command: Callable) -> Callable:
    """SLIDES and --out."""
    return add_options(_PLACES, command)


def tiling_options(command: Callable) -> Callable:
    """Where the tiles lie, and how many may be bad (see `TilingPlan`)."""
    return add_options(_TILING, command)


def job_options(command: Callable) -> Callable:
    """How the job is run."""
    return add_options(_JOB, command)


def report_slides(result: JobResult, place: str) -> None:
    """Print how many slides were done, and where their outputs are."""
    click.echo(f"{len(result.done)} of {result.slides} slides done -> {place}")
    if result.no_tissue and result.done:
        names = _few(result.no_tissue)
        click.echo(f"{len(result.no_tissue)} without an output, for want of tissue (--min-tissue): {names}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def report_troubles(result: JobResult) -> int:
    """Print on stderr what a person must know even of a quiet run; the exit code that follows."""
    if result.enlarged:
        warnings.warn(
            f"{len(result.enlarged)} of {result.slides} slides are coarser than --mpp, and their tiles enlarged from "
            f"fewer pixels (summary.csv has their mpp): {_few(result.enlarged)}",
            SSMambaWarning,
            stacklevel=2,
        )
    if result.no_tissue and not result.done:
        warnings.warn(
            f"not one tile: {len(result.no_tissue)} of {result.slides} slides have no tissue, or in each tile less "
            f"than --min-tissue (is their mpp right? summary.csv has it): {_few(result.no_tissue)}",
            SSMambaWarning,
            stacklevel=2,
        )
    for name, reason in result.failed.items():
        click.echo(f"failed: {name}: {reason}", err=True)
    if result.failed:
        click.echo(
            f"{len(result.failed)} of {result.slides} slides failed; try them again with --retry-failed", err=True
        )
    if result.unfinished:
        click.echo(
            f"{len(result.unfinished)} of {result.slides} slides are in the hands of other processes: "
            f"{_few(result.unfinished)}; run the command again if those end without them",
            err=True,
        )
    return int(bool(result.failed))


def show_slides(slides: Iterable[PlannedSlide]) -> None:
    """Print a dry run's slides."""
    for slide in slides:
        mpp = "" if slide.mpp is None else f", level 0 at {slide.mpp:g} um/px ({slide.mpp_source})"
        click.echo(f"{slide.name}: {slide.status}, {slide.reason or f'{slide.tiles} tiles{mpp}'}")
