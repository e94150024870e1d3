"""`ssmamba publish`: trained weights to the Hugging Face Hub, or to a folder that holds what would go there."""

from __future__ import annotations

from typing import Any

import click

from ssmamba_models.choices import WEIGHT_DTYPES
from ssmamba_models.engine.config import load_config, parse_setting


@click.command()
@click.argument("source", metavar="RUN|FILE", type=click.Path())
@click.option("--repo-id", required=True, metavar="ORG/NAME", help="Repository; made where it is not there.")
@click.option("--model", help="timm name. Default: what the weights say.")
@click.option("--dry-run", type=click.Path(), metavar="DIR", help="Write a new folder and upload nothing.")
@click.option("--card-info", type=click.Path(), metavar="YAML", help="What the card shall say; see below.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One key of it; may be repeated.")
@click.option(
    "--dtype",
    type=click.Choice(WEIGHT_DTYPES),
    default="float32",
    show_default=True,
    help="Of stored weights; bfloat16: half the size, good to about 2 digits.",
)
@click.option("--private", is_flag=True, help="Only for members of ORG.")
@click.option("--revision", metavar="BRANCH", help="Default: main.")
@click.option("--token", help="Default: HF_TOKEN, or that of `hf auth login`.")
def command(source: str, repo_id: str, card_info: str | None, settings: tuple[str, ...], **options: Any) -> None:
    """Put trained weights on the Hugging Face Hub, or into a folder.

    RUN is of `ssmamba pretrain`, `finetune` or `slide-pretrain`; FILE holds weights. Uploads model.safetensors,
    config.json and a model card (README.md) in one commit; then timm.create_model("hf-hub:ORG/NAME", pretrained=True)
    loads them, and slide encoders create_slide_encoder(NAME, D, pretrained="hf-hub:ORG/NAME"). Look at the card first:
    --dry-run DIR.

    Keys of --card-info and --set, each unknown where not given: license (of the weights, such as
    apache-2.0), description, training_data, data_license, target_mpp (microns per pixel), hardware, results,
    limits. Epochs, time and hyper-parameters come from the run.

    \b
    Examples:
      ssmamba publish run --repo-id my-lab/tiny --dry-run card \\
        --set training_data="LC25000, train split" --set target_mpp=0.5
      ssmamba publish run --repo-id my-lab/tiny --card-info card.yaml

    Exit code: 0 published, 2 bad input.
    """
    from ssmamba_models.hub import CardInfo, publish

    info = load_config(CardInfo, card_info, dict(parse_setting(text) for text in settings))
    done = publish(source, repo_id, info=info, **options)
    click.echo(f"{', '.join(done.files)} -> {done.place}")
    click.echo(f"load with {done.call}")
