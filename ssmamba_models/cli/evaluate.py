"""`ssmamba evaluate`: labelled tiles and encoders in, a report out."""

from __future__ import annotations

from typing import Any

import click

from ssmamba_models.cli.options import encoder_precision_option, pool_option, printable, threads_option


@click.command()
@click.option("--data", required=True, type=click.Path(), help="Folder of labelled tiles.")
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    metavar="[LABEL=]NAME[@INIT]",
    help="An encoder; once for each. NAME: ours, any timm name, or color_histogram. INIT: as --init, or a training per "
    "seed, RUN,RUN,...",
)
@click.option(
    "--init",
    default="pretrained",
    show_default=True,
    metavar="pretrained|none|RUN|FILE",
    help="INIT of each --model that has none. none: random weights.",
)
@click.option("--out", required=True, type=click.Path(), help="Folder for the report and the features.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME=class,class,...",
    help="Classes to tell apart; once for each task. Default: all classes.",
)
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True, help="Folds, if tiles have no splits.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Repetitions.")
@click.option("--magnification", is_flag=True, help="Compare tiles with themselves at half resolution.")
@click.option("--img-size", type=click.IntRange(1), help="Side of the input in pixels. Default: the model's own.")
@pool_option
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Tiles per forward pass.")
@click.option(
    "--workers", type=click.IntRange(0), help="Processes that decode tiles; 0: none. Default: by the machine."
)
@threads_option
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU where there is one.")
@encoder_precision_option
@click.option("--overwrite", is_flag=True, help="Replace an existing report; features that fit are used again.")
@click.option("--quiet", is_flag=True, help="No progress bars and no closing table.")
@click.pass_context
def command(
    ctx: click.Context,
    data: str,
    models: tuple[str, ...],
    init: str,
    out: str,
    tasks: tuple[str, ...],
    folds: int,
    seeds: int,
    magnification: bool,
    overwrite: bool,
    quiet: bool,
    **embedding: Any,
) -> None:
    """Score encoders on labelled tiles: probes, kNN, few shots.

    Every figure has a group-bootstrap interval. Tiles lie in class folders, or are listed in a manifest.csv (path,
    label, and optionally group and split). Groups are never divided; several encoders are compared on the same folds.
    Writes report.md, report.json and plots/ whole or not at all, and keeps the features for the next run.

    \b
    Examples:
      ssmamba evaluate --data tiles --model ssmamba_tiny --out report
      ssmamba evaluate --data tiles --out report --task lung=benign,tumour \\
        --model mamim=ssmamba_tiny@run --model ssmamba_tiny@none \\
        --model color_histogram

    Exit code: 0 all tiles scored, 1 some were unreadable (each is listed), 2 bad input.
    """
    from ssmamba_models.evaluation.embedding import Embedding
    from ssmamba_models.evaluation.evaluate import evaluate
    from ssmamba_models.evaluation.model_choice import parse_models
    from ssmamba_models.evaluation.settings import Settings
    from ssmamba_models.evaluation.tasks import parse_task

    report = evaluate(
        data,
        parse_models(models, init),
        out,
        tasks=[parse_task(text) for text in tasks],
        settings=Settings(folds=folds, seeds=seeds, magnification=magnification),
        embedding=Embedding(**embedding, progress=not quiet),
        overwrite=overwrite,
    )
    if not quiet:
        _print_scores(report)
        click.echo(f"wrote {out}/report.md")
    unreadable = report["data"]["unreadable"]
    for entry in unreadable:
        click.echo(f"unreadable: {printable(entry['path'])}: {entry['reason']}", err=True)
    if unreadable:
        click.echo(f"{len(unreadable)} of {report['data']['tiles']} tiles unreadable and not scored", err=True)
        ctx.exit(1)


def _print_scores(report: dict) -> None:
    width = max(len(entry["label"]) for entry in report["models"])
    for task in report["tasks"]:
        click.echo(f"{task['name']} ({', '.join(task['classes'])}), macro-F1 with 95 % interval")
        for label, results in task["results"].items():
            probe, neighbours = (_short(results[method]["metrics"]["macro_f1"]) for method in ("linear_probe", "knn"))
            click.echo(f"  {label:<{width}}  linear probe {probe}  kNN {neighbours}")


def _short(figure: dict) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
