"""`ssmamba embed`: a folder of tiles to one HDF5 file of features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ssmamba_models.cli.options import encoder_precision_option, pool_option, printable, threads_option

if TYPE_CHECKING:
    from ssmamba_models.engine.embed import EmbedSummary


@click.command()
@click.argument("folder", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="HDF5 file to write; its folder must exist.")
@click.option("--model", default="ssmamba_small", show_default=True, help="Ours, any timm name, or hf-hub:ORG/NAME.")
@click.option("--pretrained", is_flag=True, help="Use the model's published weights.")
@click.option("--checkpoint", type=click.Path(), help="Use the weights of this file or run folder.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Tiles per forward pass.")
@click.option(
    "--workers", type=click.IntRange(0), help="Processes that decode tiles; 0: none. Default: by the machine."
)
@threads_option
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU where there is one.")
@encoder_precision_option
@click.option(
    "--img-size", type=click.IntRange(1), help="Side of the input in pixels. Default: the checkpoint's or model's own."
)
@pool_option
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of random weights.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", is_flag=True, help="No progress bar and no closing line.")
@click.pass_context
def command(ctx: click.Context, quiet: bool, **options: Any) -> None:
    """Turn a folder of tiles into one HDF5 file of features.

    Tiles lie in FOLDER, nested or flat, or are those that its manifest.csv lists. The file holds features (N, D)
    float32, paths, labels (where class folders or the manifest name them) and, as attributes, the model, its weights
    and the input transform. It is written whole or not at all.

    \b
    Examples:
      ssmamba embed tiles --pretrained --out features.h5
      ssmamba embed tiles --model ssmamba_tiny --checkpoint run --out features.h5

    Exit code: 0 all tiles embedded, 1 some were unreadable (each is listed), 2 bad input.
    """
    from ssmamba_models.engine.embed import embed_folder

    summary = embed_folder(**options, progress=not quiet)
    if not quiet:
        _report(summary)
    for path, reason in summary.unreadable:
        click.echo(f"unreadable: {printable(path)}: {reason}", err=True)
    if summary.unreadable:
        bad, tiles = len(summary.unreadable), summary.count + len(summary.unreadable)
        click.echo(f"{bad} of {tiles} tiles unreadable and not in {summary.out}", err=True)
        ctx.exit(1)


def _report(summary: EmbedSummary) -> None:
    click.echo(
        f"{summary.count} tiles x {summary.embed_dim} features -> {summary.out} "
        f"({summary.seconds:.1f} s, {summary.tiles_per_second:.1f} tiles/s)"
    )
