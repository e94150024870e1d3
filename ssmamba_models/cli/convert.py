"""`ssmamba convert`: feature files of CLAM and TRIDENT to ours, and back."""

from __future__ import annotations

from typing import Any

import click

from ssmamba_models.choices import FEATURE_LAYOUTS


@click.command()
@click.argument("source", metavar="SRC", type=click.Path())
@click.option("--from", "source_layout", required=True, type=click.Choice(FEATURE_LAYOUTS), help="Layout of SRC.")
@click.option("--to", "target_layout", required=True, type=click.Choice(FEATURE_LAYOUTS), help="Layout to write.")
@click.option("--out", required=True, type=click.Path(), help="Folder to write; made where it is missing.")
@click.option(
    "--mpp-override", "--level0-mpp", "level0_mpp", type=float, help="Micrometres per level-0 pixel of all slides."
)
@click.option("--mpp", "--target-mpp", "target_mpp", type=float, help="Micrometres per pixel of the tiles.")
@click.option("--mpp-csv", type=click.Path(), help="CSV: slide,mpp (of level 0); may have level0_width and others.")
@click.option("--tile-size", "--patch-size", "patch_size", type=int, help="Side of the tiles in pixels.")
@click.option("--overlap", type=int, help="Overlap of neighbouring tiles in pixels (CLAM's files do not say it).")
@click.option("--model", help="Name of the encoder, where the files do not say it.")
@click.option("--coords", type=click.Path(), help="CLAM's folder of coordinate files (patches).")
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@click.option("--quiet", is_flag=True, help="No closing line.")
@click.pass_context
def command(
    ctx: click.Context, source: str, mpp_csv: str | None, coords: str | None, quiet: bool, **options: Any
) -> None:
    """Convert feature files of CLAM and TRIDENT to ours, and back.

    SRC is one file, or a folder of them. Nothing is lost: what the other layout has no field for is stored beside it,
    and the way back gives the same features, coordinates and attributes. What a file does not say and no option gives
    is an error, never a guess.

    \b
    Examples:
      ssmamba convert job --from ssmamba --to clam --out clam
      ssmamba convert job --from trident --to ssmamba --out ours --mpp-csv mpp.csv
      ssmamba convert clam --from clam --to ssmamba --out features \\
        --coords clam/patches --mpp-override 0.25 --overlap 0 --model uni_v1

    Exit code: 0 all files converted, 1 some could not be (each is listed), 2 bad input.
    """
    from ssmamba_models.data.convert import convert_features
    from ssmamba_models.data.slide_table import read_slide_table

    places = ("source_layout", "target_layout", "out", "overwrite")
    given = {name: value for name, value in options.items() if name not in places and value is not None}
    summary = convert_features(
        source,
        **{name: options[name] for name in places},
        given=given,
        table=None if mpp_csv is None else read_slide_table(mpp_csv),
        coords=coords,
    )
    if not quiet:
        click.echo(f"{len(summary.written)} of {len(summary.written) + len(summary.failed)} files -> {options['out']}")
    for path, reason in summary.failed:
        click.echo(f"not converted: {path}: {reason}", err=True)
    if summary.failed:
        ctx.exit(1)
