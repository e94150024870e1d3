"""`ssmamba slide-pretrain`: a slide encoder from feature files, without labels."""

from __future__ import annotations

from typing import Any

import click

from ssmamba_models.choices import SLIDE_METHODS
from ssmamba_models.cli.runs import configured, exit_code, read_config, report_end, run_options


@click.command()
@click.option("--features", type=click.Path(), help="Folder of feature files: a job's features_MODEL.")
@configured
@click.option("--method", type=click.Choice(sorted(SLIDE_METHODS)), help="Default: gigassl.")
@click.option("--model", help="A slide encoder. Default: gigassl_scm for gigassl, pama_base for pama.")
@click.option("--init", help="Weights to start from: none, a run folder or hf-hub:ORG/NAME. Default: none.")
@click.option("--epochs", type=int, help="Passes over the slides. Default: 100.")
@click.option("--batch-size", type=int, help="Slides per step, over all processes. Default: 256.")
@click.option("--lr", type=float, help="Peak learning rate. Default: 1e-3 * batch size / 256.")
@click.option("--warmup-epochs", type=float, help="Epochs of rising learning rate. Default: a tenth.")
@click.option("--max-tiles", type=int, help="Tiles of a slide that a step may read. Default: 20000.")
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
    """Pretrain a slide encoder on feature files, without labels.

    By Giga-SSL or PAMA. Feature files come from `ssmamba extract` (for Giga-SSL best with --shared-aug) or `ssmamba
    convert`: one per slide, all of one kind. OUT gets config.yaml (every setting), log.jsonl, tensorboard/,
    checkpoints/, and the encoder, config.json and model.safetensors, which `ssmamba slide-embed --run OUT` reads.
    Settings come from --config, then --set, then the options.

    \b
    Examples:
      ssmamba slide-pretrain --method gigassl --features features --out run
      ssmamba slide-pretrain --resume --out run
      ssmamba slide-pretrain --method pama --features features --out run2 \\
        --model pama_small --set method_args.mask_ratio=0.6
      accelerate launch --num_processes 4 -m ssmamba_models slide-pretrain \\
        --method pama --features features --out run

    Exit code: 0 trained to the end, 2 bad input, 130 or 143 stopped by Ctrl-C or SIGTERM (with a checkpoint).
    """
    from ssmamba_models.engine.slide_pretrain import SlidePretrainConfig, pretrain_slides

    config = read_config(SlidePretrainConfig, config_file, out, resume, settings, options)
    result = pretrain_slides(config, out, resume=resume, progress=not quiet)
    loss = f", loss {result.last['loss']:.4f} in the last epoch" if result.last else ""
    report_end(result, f"{result.step} steps{loss} -> {result.run}/model.safetensors", quiet)
    ctx.exit(exit_code(result))
