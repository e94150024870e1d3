"""`ssmamba mil`: slides from feature files; train, predict, heatmap."""

from __future__ import annotations

from typing import Any

import click

from ssmamba_models.choices import AGGREGATORS
from ssmamba_models.cli.options import precision_option, threads_option
from ssmamba_models.cli.runs import read_config


@click.group(name="mil")
def command() -> None:
    """Train, predict and draw heatmaps from feature files (MIL).

    Multiple-instance learning: a label for each slide, many tiles without one. Feature files come from `ssmamba
    extract` (or `ssmamba convert`): one per slide, all of one kind.

    \b
    Examples:
      ssmamba mil train --features features --labels labels.csv --out run
      ssmamba mil predict run --features new --out predictions.csv
      ssmamba mil heatmap run --features new/a.h5 --out maps
    """


@command.command()
@click.option("--features", type=click.Path(), help="Folder of feature files: a job's features_MODEL.")
@click.option("--labels", type=click.Path(), help="CSV: slide, label, and if you have them patient and split.")
@click.option("--out", required=True, type=click.Path(), help="Run folder to write.")
@click.option("--config", "config_file", type=click.Path(), help="YAML of settings, such as another run's config.yaml.")
@click.option("--aggregator", help=f"{', '.join(AGGREGATORS)}. Default: mambamil.")
@click.option("--folds", type=int, help="Folds, if the labels have no splits. Default: 5.")
@click.option("--epochs", type=int, help="Most passes over the slides. Default: 50.")
@click.option("--patience", type=int, help="Stop a fold after so many epochs without progress. Default: 10.")
@click.option("--batch-size", type=int, help="Slides per step, one at a time in memory. Default: 1.")
@click.option("--lr", type=float, help="Peak learning rate. Default: 1e-4.")
@click.option(
    "--balance",
    type=click.Choice(["none", "loss", "sampler"]),
    help="Let rare classes count as much: by weights in the loss, or by drawing them more often. Default: loss.",
)
@click.option("--max-tiles", type=int, help="Tiles of a slide that a training step sees. Default: 20000.")
@click.option("--skip-missing", is_flag=True, default=None, help="Leave out labelled slides without features.")
@click.option("--seed", type=int, help="Seed of folds, weights, order and tiles. Default: 0.")
@threads_option
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU where there is one.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting; may be repeated.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out; folds that are done are kept.")
@click.option("--draws", type=click.IntRange(1), default=1000, show_default=True, help="Bootstrap draws of the report.")
@click.option("--no-plots", is_flag=True, help="Draw no ROC curves and no confusion matrix.")
@click.option("--quiet", is_flag=True, help="No progress bar and no closing lines.")
def train(
    out: str,
    config_file: str | None,
    settings: tuple[str, ...],
    resume: bool,
    draws: int,
    no_plots: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train an aggregator by patient-grouped cross-validation, and report.

    Without splits in the labels each slide is scored once, by a model that saw no slide of its patient. OUT gets
    config.yaml, fold-0/, fold-1/, ..., weights.safetensors (the fold with the lowest validation loss),
    predictions.csv, report.md, report.json and plots/.

    \b
    Examples:
      ssmamba mil train --features features --labels labels.csv --out run
      ssmamba mil train --resume --out run
      ssmamba mil train --features features --labels labels.csv --out run \\
        --aggregator clam --set aggregator_args.k_sample=16
      ssmamba mil train --features features --labels labels.csv --out run \\
        --aggregator pama --set aggregator_args.init=pama_run

    Exit code: 0 trained to the end, 2 bad input.
    """
    from ssmamba_models.engine.mil import train_mil
    from ssmamba_models.engine.mil_config import MilConfig
    from ssmamba_models.evaluation.mil_report import report_mil

    config = read_config(MilConfig, config_file, out, resume, settings, options)
    result = train_mil(config, out, resume=resume, progress=not quiet)
    report = report_mil(out, draws=draws, plots=not no_plots)
    for names, text in ((result.unlabelled, "features and no label"), (result.missing, "a label and no features")):
        if names:
            click.echo(f"left out, {text}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}", err=True)
    if not quiet:
        _print_report(report, out)


def _print_report(report: dict[str, Any], out: str) -> None:
    tested = report["tested"]
    click.echo(f"{report['aggregator']} on {tested['slides']} slides of {tested['patients']} held-out patients:")
    for name, text in (("auc", "AUC"), ("macro_f1", "macro-F1"), ("accuracy", "accuracy")):
        figure = report["metrics"][name]
        if figure["value"] is not None:
            interval = f"95 % interval {figure['low']:.3f} to {figure['high']:.3f}"
            click.echo(f"  {text:<9} {figure['value']:.3f} ({interval})")
    click.echo(f"wrote {out}/report.md")


@command.command()
@click.argument("run", type=click.Path())
@click.option("--features", required=True, type=click.Path(), help="Feature files: a job's features_MODEL, or one.")
@click.option("--out", required=True, type=click.Path(), help="CSV to write; its folder must exist.")
@click.option("--ensemble", is_flag=True, help="Average the models of all folds. Default: the best fold's.")
@precision_option
@threads_option
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU where there is one.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", is_flag=True, help="No progress bar and no closing line.")
@click.pass_context
def predict(ctx: click.Context, run: str, features: str, out: str, quiet: bool, **options: Any) -> None:
    """Predict slides with the model of a run of `ssmamba mil train`.

    The CSV holds slide, tiles, prediction and a probability for each class. Slides are read one at a time, whole.

    \b
    Example:
      ssmamba mil predict run --features new --out predictions.csv

    Exit code: 0 all slides predicted, 1 some files were unreadable (each is listed), 2 bad input.
    """
    from ssmamba_models.engine.mil_predict import predict_mil

    summary = predict_mil(run, features, out, progress=not quiet, **options)
    if not quiet:
        models = "" if summary.models == 1 else f" by {summary.models} models"
        click.echo(f"{len(summary.predictions)} slides{models} -> {summary.out}")
    for path, reason in summary.unreadable:
        click.echo(f"unreadable: {path}: {reason}", err=True)
    if summary.unreadable:
        ctx.exit(1)


@command.command()
@click.argument("run", type=click.Path())
@click.option("--features", required=True, type=click.Path(), help="The slide's feature file.")
@click.option("--slide", type=click.Path(), help="The slide, to draw on. Default: white.")
@click.option("--out", required=True, type=click.Path(), help="Folder for NAME.png and NAME.geojson.")
@click.option("--max-size", type=click.IntRange(1), default=2048, show_default=True, help="Longer side, px.")
@click.option("--opacity", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Of the colours.")
@precision_option
@threads_option
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU where there is one.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@click.option("--quiet", is_flag=True, help="No closing lines.")
def heatmap(run: str, features: str, out: str, quiet: bool, **options: Any) -> None:
    """Draw how much each tile of a slide counts for what a model says of it.

    NAME.png colours the tiles by the rank of their attention, from dark (least) to yellow (most). NAME.geojson has a
    polygon for each tile, in level-0 pixels from where the slide says that its scanned area begins, as QuPath counts
    them: drop it on the slide in QuPath.

    \b
    Example:
      ssmamba mil heatmap run --features features/a.h5 --slide a.svs --out maps

    Exit code: 0 drawn, 2 bad input.
    """
    from ssmamba_models.evaluation.heatmap import draw_heatmap

    drawn = draw_heatmap(run, features, out, **options)
    if not quiet:
        chances = zip(drawn.scores.classes, drawn.scores.prediction.probabilities)
        click.echo(", ".join(f"{name} {chance:.3f}" for name, chance in chances))
        click.echo(f"wrote {drawn.png} and {drawn.geojson}")
