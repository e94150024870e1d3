"""`ssmamba check`: are these slide feature files whole, and do they go together?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssmamba_models.cli.options import check_json, is_stdout, json_option, printable, write_results

if TYPE_CHECKING:
    from ssmamba_models.data.feature_check import FileReport


@click.command()
@click.argument("paths", metavar="FILES...", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
@click.option("--quiet", is_flag=True, help="Name only the files that have a problem.")
@click.pass_context
def command(ctx: click.Context, paths: tuple[Path, ...], json_path: Path | None, quiet: bool) -> None:
    """Check slide feature files: shapes, NaN, duplicates, provenance.

    FILES are files, or folders that are searched at any depth; each file gets a line. Looks for: files that do not
    open, wrong shapes and types, NaN, infinite values, features that are all zero, tiles that lie twice or outside the
    slide, a geometry that contradicts itself, provenance that is missing, and, in one folder, features of different
    models, weights or tile sizes.

    \b
    Examples:
      ssmamba check job
      ssmamba check a.h5 b.h5 --quiet --json problems.json

    Exit code: 0 all is well, 1 there are problems, 2 bad input.
    """
    from ssmamba_models.data.feature_check import check_feature_files
    from ssmamba_models.data.hdf5 import hdf5_files

    check_json(json_path)
    # A file named twice, by itself and by its folder, is checked once.
    files = dict.fromkeys(file for path in paths for file in hdf5_files(path))
    reports = []
    for report in check_feature_files(files):
        reports.append(report)
        if (report.problems or not quiet) and not is_stdout(json_path):
            click.echo(printable(_line(report)))
    bad = sum(bool(report.problems) for report in reports)
    write_results(json_path, {"files": [_entry(report) for report in reports], "bad": bad})
    if bad:
        click.echo(f"{bad} of {len(reports)} files have problems", err=True)
        ctx.exit(1)


def _line(report: FileReport) -> str:
    if report.problems:
        return f"BAD {report.path}: " + "; ".join(f"{problem.kind}: {problem.message}" for problem in report.problems)
    facts = report.provenance
    assert facts is not None  # only a file that does not open has none, and that is a problem
    return (
        f"ok  {report.path}: {report.tiles} tiles x {report.embed_dim} {report.dtype}, {facts['model']}, "
        f"{facts['patch_size']} px at {facts['target_mpp']:g} um/px"
    )


def _entry(report: FileReport) -> dict:
    return {
        "path": str(report.path),
        "tiles": report.tiles,
        "embed_dim": report.embed_dim,
        "dtype": report.dtype,
        "provenance": report.provenance,
        "problems": [{"kind": problem.kind, "message": problem.message} for problem in report.problems],
    }
