"""`ssmamba slide-embed`: feature files and a slide encoder in, one file of slide vectors out."""

from __future__ import annotations

from typing import Any

import click

from ssmamba_models.cli.options import precision_option, threads_option


class _Tiles(click.ParamType):
    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "all" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of tiles nor all", param, ctx)


@click.command()
@click.option("--run", required=True, metavar="RUN|FOLDER|hf-hub:ORG/NAME", help="The slide encoder.")
@click.option("--features", required=True, type=click.Path(), help="Feature files: a job's features_MODEL, or one.")
@click.option("--out", required=True, type=click.Path(), help="HDF5 file to write; its folder must exist.")
@click.option("--views", type=int, help="Views that are averaged. Default: the encoder's (Giga-SSL 50, PAMA 1).")
@click.option(
    "--tiles", type=_Tiles(), help="Tiles of a view; all takes every tile once. Default: the encoder's (Giga-SSL 5)."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of what is drawn.")
@precision_option
@threads_option
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU where there is one.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", is_flag=True, help="No progress bar and no closing line.")
@click.pass_context
def command(
    ctx: click.Context,
    run: str,
    features: str,
    out: str,
    views: int | None,
    tiles: int | str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Turn feature files into one HDF5 file of slide vectors.

    The file holds embeddings (S, E) float32, slides (names), and beside them baselines/mean_pool (the mean of a
    slide's tiles) and baselines/random_encoder (the same architecture with random weights), for `ssmamba
    slide-evaluate`; model, weights, options and the features' provenance stand as attributes. It is written whole or
    not at all. Features must be of the kind that the encoder was trained on.

    \b
    Examples:
      ssmamba slide-embed --run run --features features --out slides.h5
      ssmamba slide-embed --run hf-hub:my-lab/my-slides --tiles all \\
        --features features --out slides.h5

    Exit code: 0 all slides embedded, 1 some files were unreadable (each is listed), 2 bad input.
    """
    from ssmamba_models.engine.slide_embed import embed_slides

    chosen = {name: value for name, value in (("views", views), ("tiles", tiles)) if value is not None}
    summary = embed_slides(run, features, out, options=chosen, progress=not quiet, **options)
    if not quiet:
        click.echo(f"{summary.count} slides x {summary.embed_dim} -> {summary.out}")
    for path, reason in summary.unreadable:
        click.echo(f"unreadable: {path}: {reason}", err=True)
    if summary.unreadable:
        ctx.exit(1)
