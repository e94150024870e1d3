"""`ssmamba tile`: whole slides to folders of tiles, with a manifest of their places."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from ssmamba_models.choices import TILE_SUFFIXES
from ssmamba_models.cli.slide_jobs import (
    job_options,
    places,
    report_slides,
    report_troubles,
    show_slides,
    tiling_options,
)

if TYPE_CHECKING:
    from ssmamba_models.wsi.dry_run import PlannedSlide
    from ssmamba_models.wsi.tile_slides import TileResult


@click.command()
@places
@click.option(
    "--format", type=click.Choice(tuple(TILE_SUFFIXES)), default="png", show_default=True, help="png is lossless."
)
@click.option("--quality", type=click.IntRange(1, 100), help="Of --format jpeg. Default: 95.")
@click.option("--labels", type=click.Path(), help="CSV slide,label[,patient][,split]: more columns for the manifest.")
@tiling_options
@click.option("--dry-run", "dry", is_flag=True, help="Count tiles; write nothing.")
@job_options
@click.pass_context
def command(
    ctx: click.Context, slides: tuple[str, ...], out: str, dry: bool, shard: str | None, quiet: bool, **options: Any
) -> None:
    """Cut tiles from whole slides, with a manifest of their places.

    SLIDES are files, or folders of slides. OUT gets SLIDE/X_Y.png, where X and Y are the column and row in the slide's
    grid, SLIDE/slide.json (where the tiles come from, um per pixel, level-0 corners), config.yaml and manifest.csv:
    path, slide, x, y and, with --labels, label, group (the patient) and split. Tiles lie where those of `ssmamba
    extract` with the same options do.

    Run the same command again to go on with a job that was stopped or killed: slides that are done stay as they are.
    Several processes, on several machines, may run it at once on one folder. What became of each slide stands in
    summary.csv. A job keeps its labels; give --labels again to change them.

    \b
    Examples:
      ssmamba tile slides --out tiles
      ssmamba tile slides --out tiles --format jpeg --labels labels.csv
      ssmamba pretrain --method sgcl --data tiles --model resnet18 --out run

    Exit code: 0 no slide failed (stderr tells of those still in other processes' hands), 1 some failed (each is
    listed), 2 bad input.
    """
    from ssmamba_models.wsi.slide_list import parse_shard
    from ssmamba_models.wsi.tile_slides import TilePlan, count_slide_tiles, tile_slides

    plan = TilePlan(**options, shard=parse_shard(shard))
    if dry:
        ctx.exit(_show_plan(count_slide_tiles(slides, out, plan, progress=not quiet)))
    result = tile_slides(slides, out, plan, progress=not quiet)
    if not quiet:
        _report(result)
    ctx.exit(report_troubles(result))


def _report(result: TileResult) -> None:
    report_slides(result, os.fspath(result.manifest))
    if result.tiles:
        click.echo(f"{result.tiles} tiles in {result.seconds:.1f} s, {result.tiles / result.seconds:.1f} tiles/s")


def _show_plan(slides: list[PlannedSlide]) -> int:
    from ssmamba_models.wsi.status import FAILED, PENDING

    show_slides(slides)
    click.echo(f"{sum(slide.tiles for slide in slides if slide.status == PENDING)} tiles to do")
    return int(any(slide.status == FAILED for slide in slides))
