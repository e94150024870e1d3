"""`ssmamba pretrain`: an encoder from tiles, without labels."""

from __future__ import annotations

from typing import Any

import click

from ssmamba_models.cli.runs import exit_code, read_config, report_end
from ssmamba_models.engine.methods import METHODS
from ssmamba_models.engine.pretrain import PretrainConfig, pretrain


@click.command()
@click.option("--data", type=click.Path(), help="Folder of tiles, or for sgcl a manifest; labels are not needed.")
@click.option("--out", required=True, type=click.Path(), help="Run folder to write.")
@click.option("--config", "config_file", type=click.Path(), help="YAML of settings, such as another run's config.yaml.")
@click.option("--method", type=click.Choice(sorted(METHODS)), help="Default: mamim.")
@click.option("--model", help="An ssmamba model, or for sgcl any of timm. Default: ssmamba_small.")
@click.option("--init", help="Weights to start from: none, pretrained, a file or a run folder. Default: none.")
@click.option("--classes", multiple=True, metavar="A,B,C", help="Take the tiles of these classes. Default: all.")
@click.option("--split", help="Where the data has splits, take this one. Default: train.")
@click.option("--epochs", type=int, help="Passes over the data. Default: 100.")
@click.option("--batch-size", type=int, help="Tiles per step, over all processes. Default: 256 (sgcl 128).")
@click.option("--accumulate", type=int, help="Cut a batch into so many parts, to need less memory. Default: 1.")
@click.option("--lr", type=float, help="Peak learning rate. Default: 1.5e-4 (sgcl 0.03) * batch size / 256.")
@click.option("--warmup-epochs", type=float, help="Epochs of rising learning rate. Default: a tenth (sgcl none).")
@click.option("--img-size", type=int, help="Side of the input in pixels. Default: 224.")
@click.option("--ema-decay", type=float, help="Keep and export an average of the weights with this decay.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="Default: bf16 on GPUs that have it.")
@click.option("--seed", type=int, help="Seed of weights, order and views. Default: 0.")
@click.option("--workers", type=int, help="Processes that read tiles; 0: none. Default: by the machine.")
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU where there is one.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting; may be repeated.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out (started if there is none).")
@click.option("--quiet", is_flag=True, help="No progress bar and no closing line.")
@click.pass_context
def command(ctx: click.Context, out: str, config_file: str | None, settings, resume: bool, quiet: bool, **options):
    """Pretrain an encoder on your tiles, without labels.

    mamim learns an ssmamba model by filling in hidden parts of tiles. sgcl learns any timm model by telling tiles
    apart, with their neighbours in the slide as positives: --data is a folder with a manifest.csv (or a CSV) of the
    columns path, slide, x, y, where neighbours differ by 1 in x or y.

    OUT gets config.yaml (every setting), log.jsonl, tensorboard/, checkpoints/, weights.safetensors, which
    `ssmamba embed --checkpoint` reads, and of mamim reconstructions/. Settings come from --config, then --set, then the
    options.

    \b
    ssmamba pretrain --data tiles --model ssmamba_tiny --out run
    ssmamba pretrain --resume --out run
    ssmamba pretrain --config run/config.yaml --out run2 --set view_args.mask_ratio=0.6
    ssmamba pretrain --method sgcl --data placed/manifest.csv --model resnet18 --out run
    accelerate launch --num_processes 4 $(which ssmamba) pretrain --data tiles --out run

    Exit code: 0 trained to the end, 2 bad input, 130 or 143 stopped by Ctrl-C or SIGTERM (with a checkpoint).
    """
    config = read_config(PretrainConfig, config_file, out, resume, settings, options)
    result = pretrain(config, out, resume=resume, progress=not quiet)
    closing = f"{result.step} steps{_loss(result.last)} -> {result.run}/weights.safetensors"
    report_end(result, closing, quiet)
    ctx.exit(exit_code(result))


def _loss(last: dict[str, Any]) -> str:
    return f", loss {last['loss']:.4f} in the last epoch" if last else ""
