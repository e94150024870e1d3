"""`ssmamba benchmark`: measure the scans and the models on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ssmamba_models.benchmark.defaults import (
    ALLOCATORS,
    DEFAULT_MODEL,
    DEFAULT_PEER,
    DEFAULT_PEERS,
    DEFAULT_SIZES,
    DTYPE_CHOICES,
    LAYOUTS,
    METHODS,
    OP_DTYPES,
    OPS,
    TITLE,
)
from ssmamba_models.choices import KMEANS
from ssmamba_models.cli.options import add_options, check_json, json_option, threads_option, write_results
from ssmamba_models.engine.process_memory import keep_large_blocks
from ssmamba_models.output import check_output, whole_file


@click.group()
@click.pass_context
def command(ctx: click.Context) -> None:
    """Measure the scans and the models on this machine.

    All contenders take turns in one run, so that their ratios hold even where others use the machine too.
    Times are medians; the JSON file holds every sample and describes the machine.

    \b
    Example:
      ssmamba benchmark models --sizes 224,512 --json models.json
    """
    if ctx.invoked_subcommand not in ("models", "train", "all"):
        keep_large_blocks()  # as the commands do whose work is measured


_COMMON = (
    click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where to run."),
    threads_option,
    click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Samples each."),
    json_option,
)

_DTYPE = click.option(
    "--dtype",
    type=click.Choice(DTYPE_CHOICES),
    default="float32",
    show_default=True,
    help="Computation precision; bfloat16 of eager models is autocast.",
)
_PEERS = click.option(
    "--peers",
    default=",".join(DEFAULT_PEERS),
    show_default=", ".join(DEFAULT_PEERS),
    metavar="NAMES",
    help="Models of timm to compare it with; commas between.",
)


def _common_options(function: Callable) -> Callable:
    """What all benchmarks are told about where and how long to run."""
    return add_options(_COMMON, function)


@command.command("ops")
@click.option("--op", "ops", multiple=True, type=click.Choice(OPS), help="Measure this operator; repeatable.")
@click.option("--backend", "backends", multiple=True, help="Measure this backend; repeatable.  [default: all]")
@click.option("--dtype", type=click.Choice(OP_DTYPES), default="float32", show_default=True, help="Of activations.")
@click.option("--budget", default=60.0, show_default=True, help="Seconds per case before rounds are cut.")
@_common_options
def ops(
    ops: tuple[str, ...],
    backends: tuple[str, ...],
    dtype: str,
    budget: float,
    device: str,
    threads: int | None,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Every backend of the scans against their definition: speed and error.

    \b
    Example:
      ssmamba benchmark ops --op directional_scan --rounds 3

    Exit code: 0 measured, 2 bad input.
    """
    from ssmamba_models.benchmark.ops import OpsPlan, format_ops, run_ops

    plan = OpsPlan(
        ops=ops or None,
        backends=backends or None,
        device=device,
        dtype=dtype,
        rounds=rounds,
        threads=threads,
        budget_s=budget,
    )
    _run(run_ops, plan, format_ops, json_path)


@command.command("models")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="The model to compare.")
@_PEERS
@click.option(
    "--sizes",
    default=",".join(map(str, DEFAULT_SIZES)),
    show_default=True,
    metavar="PIXELS",
    help="Sizes of the images.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Images per batch.  [default: chosen per size, holding the pixels per batch]",
)
@_DTYPE
@click.option("--train", is_flag=True, help="Measure supervised training steps instead of inference.")
@click.option("--compile", "compiled", is_flag=True, help="Measure peers through torch.compile too; takes minutes.")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="auto",
    show_default=True,
    help="Layout of images and weights; auto gives each model its faster one.",
)
@click.option(
    "--allocator",
    type=click.Choice(ALLOCATORS),
    default="system",
    show_default=True,
    help="CPU memory. system: as in a Python program of your own; kept: freed blocks stay, as in ssmamba extract.",
)
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure peak memory.")
@click.option("--budget", default=120.0, show_default=True, help="Seconds per comparison before rounds are cut.")
@_common_options
def models(
    model: str,
    peers: str,
    sizes: str,
    batch_size: int | None,
    dtype: str,
    train: bool,
    compiled: bool,
    layout: str,
    allocator: str,
    memory: bool,
    budget: float,
    device: str,
    threads: int | None,
    rounds: int,
    json_path: Path | None,
) -> None:
    """A model against its peers: images per second, peak memory and size.

    In inference the model is measured as commands run it (ssmamba_models.optimize) and eager, its peers eager and, with
    --compile, through torch.compile (inductor, frozen weights); one table has all ratios.

    \b
    Example:
      ssmamba benchmark models --dtype both --allocator both --compile

    Exit code: 0 measured, 2 bad input.
    """
    from ssmamba_models.benchmark.models import ModelsPlan, run_models
    from ssmamba_models.benchmark.models_table import format_models

    plan = ModelsPlan(
        model=model,
        peers=_split(peers),
        sizes=[_whole_number(size) for size in _split(sizes)],
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        train=train,
        compile=compiled,
        layout=layout,
        allocator=allocator,
        memory=memory,
        rounds=rounds,
        threads=threads,
        budget_s=budget,
    )
    _run(run_models, plan, format_models, json_path)


@command.command("train")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Our model.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="both",
    show_default=True,
    help="Steps to measure; mamim: against a masked autoencoder, and the wait for data.",
)
@_PEERS
@click.option("--peer", default=DEFAULT_PEER, show_default=True, help="A ViT of timm, trained as a masked autoencoder.")
@click.option(
    "--img-size",
    "--size",
    "size",
    type=click.IntRange(1),
    default=224,
    show_default=True,
    help="Side of the images in pixels.",
)
@click.option("--batch-size", type=click.IntRange(1), help="Tiles per step.  [default: chosen by method and device]")
@_DTYPE
@click.option(
    "--allocator",
    type=click.Choice(ALLOCATORS),
    help="CPU memory, as of `benchmark models`.  [default: kept where that is possible, as in ssmamba pretrain]",
)
@click.option("--data", type=click.Path(), help="Folder of tiles to read.  [default: synthetic tiles]")
@click.option("--workers", type=click.IntRange(0), help="Processes that read tiles.  [default: chosen by the device]")
@click.option("--wait-steps", type=click.IntRange(1), default=10, show_default=True, help="Steps that read their data.")
@click.option("--budget", default=120.0, show_default=True, help="Seconds per comparison before rounds are cut.")
@_common_options
def train(json_path: Path | None, budget: float, peers: str, allocator: str | None, **options: Any) -> None:
    """Training steps: supervised against peers, MAMIM against a masked autoencoder.

    Says also how much of its time a MAMIM training waits for data. Supervised steps of several sizes, or through
    torch.compile: `benchmark models --train`.

    \b
    Example:
      ssmamba benchmark train --dtype both --data tiles

    Exit code: 0 measured, 2 bad input.
    """
    from ssmamba_models.benchmark.train import TrainPlan, format_train, run_train

    if allocator is None:
        keep_large_blocks()
    plan = TrainPlan(**options, peers=_split(peers), allocator=allocator or "system", budget_s=budget)
    _run(run_train, plan, format_train, json_path)


@command.command("extract")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Any timm name; its weights are random.")
@click.option("--tiles", type=click.IntRange(1), default=256, show_default=True, help="Tiles of the synthetic slide.")
@click.option("--tile-size", type=click.IntRange(1), default=224, show_default=True, help="Side of a tile in pixels.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Tiles per forward pass.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read tiles.  [default: chosen by the device]")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where to run.")
@threads_option
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Runs.")
@json_option
def extract(json_path: Path | None, **options: Any) -> None:
    """Extraction of a slide from end to end against the model alone.

    Many tiles show that memory is bounded.

    \b
    Example:
      ssmamba benchmark extract --model test_ssmamba --tiles 100000 --tile-size 32

    Exit code: 0 measured, 2 bad input.
    """
    from ssmamba_models.benchmark.extract import ExtractBenchmark, format_extract, run_extract

    _run(run_extract, ExtractBenchmark(**options), format_extract, json_path)


@command.command("sgcl")
@click.option("--vectors", type=click.IntRange(100), default=100_000, show_default=True, help="Tiles, random vectors.")
@click.option("--embed-dim", type=click.IntRange(1), default=384, show_default=True, help="Width of encoder features.")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Tiles per step.")
@click.option("--kmeans", type=click.Choice(KMEANS), default="sklearn", show_default=True, help="Package for k-means.")
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure peak memory.")
@click.option("--budget", default=300.0, show_default=True, help="Seconds before rounds are cut.")
@click.option("--device", metavar="cpu|cuda", help="Where to run.  [default: a GPU where there is one]")
@threads_option
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Samples each.")
@json_option
def sgcl(json_path: Path | None, budget: float, **options: Any) -> None:
    """What SGCL costs besides the encoder, and for a million tiles.

    Neighbours, clusters, nearest entries and hard negatives.

    \b
    Example:
      ssmamba benchmark sgcl --vectors 10000

    Exit code: 0 measured, 2 bad input.
    """
    from ssmamba_models.benchmark.sgcl import SgclBenchmark, format_sgcl, run_sgcl

    _run(run_sgcl, SgclBenchmark(**options, budget_s=budget), format_sgcl, json_path)


@command.command("all")
@click.option("--quick", is_flag=True, help="Tiny models on small inputs: to see that everything runs.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where to run.")
@threads_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder for report.md, which must exist.  [default: none]")
@json_option
def everything(json_path: Path | None, out: Path | None, **options: Any) -> None:
    """All benchmarks in one report, with every ratio.

    On two cores it takes about half an hour. What cannot run here is left out, with the reason.

    \b
    Example:
      ssmamba benchmark all --json all.json --out .

    Exit code: 0 measured, 2 bad input.
    """
    from ssmamba_models.benchmark.all_benchmarks import AllPlan, markdown_all, run_all

    page = None if out is None else _check_page(out / "report.md")
    check_json(json_path)
    report = run_all(AllPlan(**options), progress=lambda line: click.echo(line, err=True))
    text = markdown_all(report)
    if page is not None:
        with whole_file(page, overwrite=True) as part:
            part.write_text(text, encoding="utf-8")
    if not write_results(json_path, report):
        click.echo(text)


def _check_page(page: Path) -> Path:
    # Reports of `ssmamba evaluate` and others have the same name.
    if check_output(page, overwrite=True).is_file() and not page.read_bytes().startswith(TITLE.encode()):
        raise FileExistsError(f"{str(page)!r} exists and is no report of `ssmamba benchmark`; give another --out")
    return page


def _run(measure: Callable, plan: object, show: Callable[[dict], str], json_path: Path | None) -> None:
    """Measure, print and write; progress goes to stderr, so that the table can be piped."""
    check_json(json_path)
    report = measure(plan, progress=lambda line: click.echo(line, err=True))
    if not write_results(json_path, report):
        click.echo(show(report))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--sizes: {text!r} is not a whole number of pixels; write 224,512") from None
