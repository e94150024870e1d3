"""`ssmamba extract`: whole slides to a job folder of feature files."""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING, Any

import click

from ssmamba_models.choices import ENGINES, FEATURE_DTYPES
from ssmamba_models.cli.options import encoder_precision_option, pool_option
from ssmamba_models.cli.slide_jobs import (
    job_options,
    places,
    report_slides,
    report_troubles,
    show_slides,
    tiling_options,
)

if TYPE_CHECKING:
    from ssmamba_models.wsi.dry_run import DryRun
    from ssmamba_models.wsi.extract import ExtractResult


@click.command()
@places
@click.option("--model", default="ssmamba_small", show_default=True, help="Ours, any timm name, or hf-hub:ORG/NAME.")
@click.option("--pretrained", is_flag=True, help="Use the model's published weights.")
@click.option("--checkpoint", type=click.Path(), help="Use the weights of this file or run folder.")
@tiling_options
@pool_option
@click.option(
    "--dtype", type=click.Choice(FEATURE_DTYPES), default="float32", show_default=True, help="Of stored features."
)
@click.option("--grid", is_flag=True, help="Store the token map of each tile too (large).")
@click.option(
    "--shared-aug",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Bags of augmented tiles for each slide, for slide-pretrain --method gigassl (50 is usual; takes long).",
)
@click.option("--shared-aug-tiles", type=click.IntRange(1), default=256, show_default=True, help="Tiles of a bag.")
@click.option("--dry-run", "dry", is_flag=True, help="Count tiles and estimate the time; write nothing.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Tiles per forward pass.")
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU where there is one.")
@encoder_precision_option
@click.option("--img-size", type=click.IntRange(1), help="Side of the model's input. Default: its own.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of weights and bags.")
@click.option("--engine", type=click.Choice(ENGINES), default="local", show_default=True, help="ray: on a Ray cluster.")
@click.option("--num-cpus", type=float, default=2, show_default=True, help="Ray: CPUs per slide.")
@click.option("--num-gpus", type=float, default=0, show_default=True, help="Ray: GPUs per slide; 0.25 puts 4 on one.")
@click.option("--max-retries", type=click.IntRange(0), default=3, show_default=True, help="Ray: of a slide's task.")
@job_options
@click.pass_context
def command(
    ctx: click.Context, slides: tuple[str, ...], out: str, dry: bool, shard: str | None, quiet: bool, **options: Any
) -> None:
    """Turn whole slides into feature files in a job folder.

    SLIDES are files, or folders of slides. Run the same command again to go on with a job that was stopped or killed:
    slides that are done stay as they are. Several processes, on several machines, may run it at once on one folder.
    What became of each slide stands in summary.csv.

    \b
    Examples:
      ssmamba extract slides --out job --model ssmamba_small --pretrained
      ssmamba extract slides --out job --dry-run
      ssmamba extract slides --out job --model resnet50 --mpp 1 --tile-size 256

    Exit code: 0 no slide failed (stderr tells of those still in other processes' hands), 1 some failed (each is
    listed), 2 bad input.
    """
    from ssmamba_models.wsi.dry_run import dry_run
    from ssmamba_models.wsi.extract import extract_slides
    from ssmamba_models.wsi.extract_plan import ExtractPlan
    from ssmamba_models.wsi.slide_list import parse_shard

    plan = ExtractPlan(**options, shard=parse_shard(shard))
    if dry:
        ctx.exit(_show_plan(dry_run(slides, out, plan, progress=not quiet)))
    result = extract_slides(slides, out, plan, progress=not quiet)
    if not quiet:
        _report(result)
    ctx.exit(report_troubles(result))


def _report(result: ExtractResult) -> None:
    timing = result.timing
    report_slides(result, os.fspath(result.features))
    if timing.tiles:
        click.echo(
            f"{timing.tiles} tiles in {timing.seconds:.1f} s, {timing.tiles_per_second:.1f} tiles/s; the model waited "
            f"for tiles {timing.wait_share:.0%} of the time"
        )


def _show_plan(run: DryRun) -> int:
    from ssmamba_models.wsi.status import FAILED

    show_slides(run.slides)
    hours = datetime.timedelta(seconds=round(run.seconds))
    bags = f" and {run.bag_tiles} of bags" if run.bag_tiles else ""
    click.echo(f"{run.tiles} tiles{bags} to do, about {hours} at {run.tiles_per_second:.1f} tiles/s (the model alone)")
    return int(any(slide.status == FAILED for slide in run.slides))
