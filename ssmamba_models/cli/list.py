"""`ssmamba list`: the models of this zoo, their sizes, and which have published weights."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import click

from ssmamba_models.cli.options import check_json, json_option, write_results

_SIDE = 224


@click.command()
@click.argument("pattern", metavar="[FILTER]", default="*")
@json_option
def command(pattern: str, json_path: Path | None) -> None:
    """List the models, their sizes, and which have trained weights.

    FILTER is a part of a name, or a pattern with * or ?, in upper or lower case. Parameters and GMACs are those of the
    encoder (num_classes=0), GMACs for one image of 224 x 224 px.

    \b
    Examples:
      ssmamba list
      ssmamba list tiny --json models.json

    Exit code: 0 listed, 2 bad input.
    """
    check_json(json_path)
    rows = [_describe(name) for name in _matching(pattern)]
    if not write_results(json_path, rows):
        click.echo(_table(rows))


def _matching(pattern: str) -> list[str]:
    from ssmamba_models import list_models

    names = list_models()
    wild = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = [name for name in names if fnmatch.fnmatchcase(name.lower(), wild.lower())]
    if not found:
        raise ValueError(f"no model matches {pattern!r}; there are: {', '.join(names)}")
    return found


def _describe(name: str) -> dict:
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # On the meta device a model has shapes but no memory, so listing takes a moment, not a minute.
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0).eval()
        image = torch.empty(1, 3, _SIDE, _SIDE)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image)
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "embed_dim": model.num_features,
        "gmacs": counter.get_total_flops() / 2e9,
        "pretrained_tags": [tag.split(".", 1)[1] for tag in timm.list_pretrained(f"{name}.*")],
    }


def _table(rows: list[dict]) -> str:
    width = max(len("model"), *(len(row["model"]) for row in rows))
    lines = [f"{'model':{width}}  {'params (M)':>10}  {'embed_dim':>9}  {'GMACs@224':>9}  pretrained"]
    lines += [
        f"{row['model']:{width}}  {row['parameters'] / 1e6:>10.2f}  {row['embed_dim']:>9}  "
        f"{row['gmacs']:>9.2f}  {', '.join(row['pretrained_tags']) or 'none'}"
        for row in rows
    ]
    return "\n".join(lines)
