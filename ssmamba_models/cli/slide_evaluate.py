"""`ssmamba slide-evaluate`: slide vectors and labels in, a report out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from ssmamba_models.cli.options import threads_option


@click.command()
@click.option(
    "--embeddings",
    "named",
    multiple=True,
    required=True,
    metavar="[NAME=]FILE",
    help="File of `ssmamba slide-embed`, or .npy; once for each.",
)
@click.option("--labels", required=True, type=click.Path(), help="CSV: slide, label, and if there are patient, split.")
@click.option("--out", required=True, type=click.Path(), help="Folder for the report.")
@click.option("--ids", type=click.Path(), help="For .npy: the rows' names, one per line, or a CSV with a column slide.")
@click.option("--features", type=click.Path(), help="For .npy: feature files, to make the baselines from.")
@click.option("--budgets", default="50,100,25%,all", show_default=True, help="Numbers of training slides.")
@click.option("--repeats", type=click.IntRange(1), default=10, show_default=True, help="Repetitions.")
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True, help="Folds, if labels have no splits.")
@click.option("--draws", type=click.IntRange(1), default=1000, show_default=True, help="Bootstrap draws.")
@click.option("--skip-missing", is_flag=True, help="Leave out labelled slides without a vector.")
@threads_option
@click.option("--no-plots", is_flag=True, help="Draw no pictures.")
@click.option("--overwrite", is_flag=True, help="Replace an existing report.")
@click.option("--quiet", is_flag=True, help="No closing lines.")
def command(
    named: tuple[str, ...],
    labels: str,
    out: str,
    ids: str | None,
    features: str | None,
    budgets: str,
    repeats: int,
    folds: int,
    draws: int,
    skip_missing: bool,
    threads: int | None,
    no_plots: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Score slide vectors on labelled slides, from few labels and many.

    Logistic regression and kNN, learned from 50, 100, a quarter and all of the training slides, 10 times, on folds
    that divide no patient, with intervals. The mean of the tiles and a random encoder, which files of `ssmamba
    slide-embed` hold, are scored beside. Writes report.md, report.json and plots/ whole or not at all.

    \b
    Examples:
      ssmamba slide-evaluate --embeddings a.h5 --labels labels.csv --out report
      ssmamba slide-evaluate --embeddings gigassl=a.h5 --embeddings pama=b.h5 \\
        --labels labels.csv --out report
      ssmamba slide-evaluate --embeddings other.npy --ids ids.txt \\
        --features features --labels labels.csv --out report

    Exit code: 0 scored, 2 bad input.
    """
    from ssmamba_models.evaluation.slide_evaluate import evaluate_slides
    from ssmamba_models.evaluation.slide_scoring import SlideSettings

    settings = SlideSettings(folds, repeats, tuple(text.strip() for text in budgets.split(",")), draws=draws)
    report = evaluate_slides(
        parse_embeddings(named),
        labels,
        out,
        ids=ids,
        features=features,
        settings=settings,
        skip_missing=skip_missing,
        plots=not no_plots,
        threads=threads,
        overwrite=overwrite,
    )
    for key, text in (("unlabelled", "a vector and no label"), ("missing", "a label and no vector")):
        names = report["data"][key]
        if names:
            click.echo(f"left out, {text}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}", err=True)
    if not quiet:
        _print_scores(report)
        click.echo(f"wrote {out}/report.md")


def parse_embeddings(named: Sequence[str]) -> dict[str, str]:
    """Read [NAME=]FILE; without a name the file's own, without its suffix.

    Raises:
        ValueError: a name is empty or there twice.
    """
    files: dict[str, str] = {}
    for text in named:
        name, equals, file = text.partition("=")
        # A path may hold an equals sign; a name holds no slash.
        if not equals or "/" in name or Path(text).exists():
            name, file = Path(text).stem, text
        if not name or not file:
            raise ValueError(f"--embeddings {text!r} is not [NAME=]FILE, such as pama=slides.h5")
        if name in files:
            raise ValueError(f"two embeddings are called {name!r}; name them, as in --embeddings other={file}")
        files[name] = file
    return files


def _print_scores(report: dict) -> None:
    width = max(len(entry["label"]) for entry in report["vectors"])
    click.echo("AUC of logistic regression with 95 % interval")
    for label, entries in report["results"].items():
        cells = [_short(entry) for entry in entries if entry["method"] == "logistic_regression"]
        click.echo(f"  {label:<{width}}  " + "  ".join(cells))


def _short(entry: dict) -> str:
    figure = entry["metrics"]["auc"]
    if figure["value"] is None:
        return f"{entry['budget']}: -"
    return f"{entry['budget']}: {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
