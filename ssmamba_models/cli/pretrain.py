"""`ssmamba pretrain`: an encoder from tiles, without labels."""

from __future__ import annotations

from typing import Any

import click

from ssmamba_models.choices import METHODS
from ssmamba_models.cli.runs import configured, exit_code, read_config, report_end, run_options


@click.command()
@click.option("--data", type=click.Path(), help="Folder of tiles, or for sgcl a manifest; labels are not needed.")
@configured
@click.option("--method", type=click.Choice(sorted(METHODS)), help="Default: mamim.")
@click.option("--model", help="An ssmamba model, or for sgcl any of timm. Default: ssmamba_small.")
@click.option("--init", help="Weights to start from: none, pretrained, a file or a run folder. Default: none.")
@click.option("--classes", multiple=True, metavar="A,B,C", help="Take the tiles of these classes. Default: all.")
@click.option("--split", help="Where the data has splits, take this one. Default: train.")
@click.option("--epochs", type=int, help="Passes over the data. Default: 100.")
@click.option("--batch-size", type=int, help="Tiles per step, over all processes. Default: 256 (sgcl 128).")
@click.option("--lr", type=float, help="Peak learning rate. Default: 1.5e-4 (sgcl 0.03) * batch size / 256.")
@click.option("--warmup-epochs", type=float, help="Epochs of rising learning rate. Default: a tenth (sgcl none).")
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
    """Pretrain an encoder on your tiles, without labels.

    mamim learns an ssmamba model by filling in hidden parts of tiles. sgcl learns any timm model by telling tiles
    apart, with their neighbours in the slide as positives: --data is a folder with a manifest.csv (or a CSV) of the
    columns path, slide, x, y, where neighbours differ by 1 in x or y.

    OUT gets config.yaml (every setting), log.jsonl, tensorboard/, checkpoints/, weights.safetensors, which
    `ssmamba embed --checkpoint` reads, and of mamim reconstructions/. Settings come from --config, then --set, then the
    options.

    \b
    Examples:
      ssmamba pretrain --data tiles --model ssmamba_tiny --out run
      ssmamba pretrain --resume --out run
      ssmamba pretrain --config run/config.yaml --out run2 \\
        --set view_args.mask_ratio=0.6
      ssmamba pretrain --method sgcl --data tiles --model resnet18 --out run
      accelerate launch --num_processes 4 -m ssmamba_models pretrain \\
        --data tiles --out run

    Exit code: 0 trained to the end, 2 bad input, 130 or 143 stopped by Ctrl-C or SIGTERM (with a checkpoint).
    """
    from ssmamba_models.engine.pretrain import PretrainConfig, pretrain

    config = read_config(PretrainConfig, config_file, out, resume, settings, options)
    result = pretrain(config, out, resume=resume, progress=not quiet)
    closing = f"{result.step} steps{_loss(result.last)} -> {result.run}/weights.safetensors"
    report_end(result, closing, quiet)
    ctx.exit(exit_code(result))


def _loss(last: dict[str, Any]) -> str:
    return f", loss {last['loss']:.4f} in the last epoch" if last else ""
