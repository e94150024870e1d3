"""`ssmamba finetune`: a classifier from labelled tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ssmamba_models.cli.runs import configured, exit_code, read_config, report_end, run_options

if TYPE_CHECKING:
    from ssmamba_models.engine.finetune import FinetuneResult


@click.command()
@click.option("--data", type=click.Path(), help="Folder of labelled tiles.")
@configured
@click.option("--model", help="Ours, or any timm name. Default: ssmamba_small.")
@click.option("--init", help="Encoder to start from: pretrained, none, a file or a run folder. Default: pretrained.")
@click.option("--classes", multiple=True, metavar="A,B,C", help="Take the tiles of these classes. Default: all.")
@click.option("--val-fraction", type=float, help="Share of the groups held out if there is no split. Default: 0.2.")
@click.option("--train-fraction", type=float, help="Train on this share of the training groups. Default: 1.")
@click.option(
    "--balance",
    type=click.Choice(["none", "loss", "sampler"]),
    help="Let rare classes count as much: by weights in the loss, or by drawing them more often. Default: none.",
)
@click.option("--epochs", type=int, help="Passes over the data. Default: 100.")
@click.option("--batch-size", type=int, help="Tiles per step, over all processes. Default: 64.")
@click.option("--lr", type=float, help="Peak learning rate. Default: 5e-4 * batch size / 256.")
@click.option("--warmup-epochs", type=float, help="Epochs of rising learning rate. Default: a tenth.")
@click.option("--layer-decay", type=float, help="Factor on the learning rate per layer downwards. Default: 0.65.")
@click.option("--label-smoothing", type=float, help="Default: 0.1.")
@click.option("--drop-path", "drop_path_rate", type=float, help="Default: the model's own.")
@click.option("--mixup", type=float, help="Alpha of mixup. Default: 0, without.")
@click.option("--cutmix", type=float, help="Alpha of cutmix. Default: 0, without.")
@click.option("--freeze-encoder", is_flag=True, default=None, help="Train the classifier layer alone.")
@click.option("--img-size", type=int, help="Side of the input in pixels. Default: 224.")
@run_options
@click.pass_context
def command(
    ctx: click.Context,
    out: str,
    config_file: str | None,
    settings: tuple[str, ...],
    resume: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a classifier on labelled tiles.

    It is validated on groups that it never saw. Labels come from class folders (DATA/tumour/a.png), also below
    DATA/train and DATA/val, or from DATA/manifest.csv with the columns path, label and, if you have them, group
    (patient or slide; never divided) and split (train, val).

    OUT gets config.yaml (every setting), log.jsonl, tensorboard/, checkpoints/ and, of the epoch with the best
    macro-F1, weights.safetensors, metrics.json and predictions.csv.

    \b
    Examples:
      ssmamba finetune --data tiles --model ssmamba_small --out run
      ssmamba embed tiles --model ssmamba_small --checkpoint run --out f.h5
      ssmamba finetune --data tiles --init pretrained_run --train-fraction 0.1 \\
        --model ssmamba_tiny --out run
      ssmamba finetune --resume --out run
      accelerate launch --num_processes 4 -m ssmamba_models finetune \\
        --data tiles --out run

    Exit code: 0 trained to the end, 2 bad input, 130 or 143 stopped by Ctrl-C or SIGTERM (with a checkpoint).
    """
    from ssmamba_models.engine.finetune import finetune
    from ssmamba_models.engine.finetune_config import FinetuneConfig

    config = read_config(FinetuneConfig, config_file, out, resume, settings, options)
    result = finetune(config, out, resume=resume, progress=not quiet)
    report_end(result.training, _closing(result) if result.best else "", quiet)
    ctx.exit(exit_code(result.training))


def _closing(result: FinetuneResult) -> str:
    best = result.best
    area = "" if best["macro_auc"] is None else f", macro AUC {best['macro_auc']:.4f}"
    return (
        f"best epoch {best['epoch']}: accuracy {best['accuracy']:.4f}, macro-F1 {best['macro_f1']:.4f}{area} on the "
        f"validation tiles -> {result.training.run}/weights.safetensors"
    )
