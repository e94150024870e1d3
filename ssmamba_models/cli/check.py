"""`ssmamba check`: are these slide feature files whole, and do they go together?"""

from __future__ import annotations

from pathlib import Path

import click

from ssmamba_models.benchmark.report import write_json
from ssmamba_models.data.feature_check import FileReport, check_feature_files
from ssmamba_models.data.hdf5 import hdf5_files
from ssmamba_models.output import check_output


@click.command()
@click.argument("paths", metavar="FILES...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all results here.")
@click.option("--quiet", is_flag=True, help="Name only the files that have a problem.")
@click.pass_context
def command(ctx: click.Context, paths: tuple[Path, ...], json_path: Path | None, quiet: bool) -> None:
    """Check slide feature files (FILES: files, or folders that are searched at any depth); one line for each.

    Looks for: files that do not open, wrong shapes and types, NaN, infinite values, features that are all zero, tiles
    that lie twice or outside the slide, a geometry that contradicts itself, provenance that is missing, and, in one
    folder, features of different models, weights or tile sizes.

    Exit code: 0 all is well, 1 there are problems, 2 bad input.
    """
    if json_path is not None:
        check_output(json_path, overwrite=True)
    # A file named twice, by itself and by its folder, is checked once.
    files = dict.fromkeys(file for path in paths for file in hdf5_files(path))
    reports = []
    for report in check_feature_files(files):
        reports.append(report)
        if report.problems or not quiet:
            click.echo(_line(report))
    bad = sum(bool(report.problems) for report in reports)
    if json_path is not None:
        write_json(json_path, {"files": [_entry(report) for report in reports], "bad": bad})
    if bad:
        click.echo(f"{bad} of {len(reports)} files have problems", err=True)
        ctx.exit(1)


def _line(report: FileReport) -> str:
    if report.problems:
        return f"BAD {report.path}: " + "; ".join(f"{problem.kind}: {problem.message}" for problem in report.problems)
    facts = report.provenance
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
