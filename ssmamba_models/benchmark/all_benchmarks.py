"""Every benchmark one after another: one JSON file with all samples, one page with all ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssmamba_models.benchmark.defaults import TITLE
from ssmamba_models.benchmark.extract import ExtractBenchmark, format_extract, run_extract
from ssmamba_models.benchmark.machine import describe_machine, machine_text, require_device
from ssmamba_models.benchmark.models import ModelsPlan, run_models
from ssmamba_models.benchmark.models_table import format_models
from ssmamba_models.benchmark.op_cases import OpCase
from ssmamba_models.benchmark.ops import OpsPlan, format_ops, run_ops
from ssmamba_models.benchmark.sgcl import SgclBenchmark, format_sgcl, run_sgcl
from ssmamba_models.benchmark.train import TrainPlan, format_train, run_train
from ssmamba_models.engine.process_memory import keep_large_blocks
from ssmamba_models.evaluation.markdown_table import markdown_table
from ssmamba_models.notice import one_line
from ssmamba_models.threads import use_threads

Progress = Callable[[str], None]


@dataclass(frozen=True)
class AllPlan:
    """What to measure.

    Attributes:
        device: "cpu" or "cuda".
        threads: CPU threads; None for the cores that this process may use.
        quick: tiny models on small inputs, to see that everything runs; the numbers mean nothing.
    """

    device: str = "cpu"
    threads: int | None = None
    quick: bool = False


@dataclass(frozen=True)
class Part:
    """One of the benchmarks.

    Attributes:
        title: of its section.
        measure, plan: `measure(plan, progress)` gives its report.
        show: its report as text.
        ratios: what of its report is a ratio: (what, of what to what, the ratio).
    """

    title: str
    measure: Callable[..., dict]
    plan: Any
    show: Callable[[dict], str]
    ratios: Callable[[dict], Iterator[tuple[str, str, float | None]]]


def make_parts(plan: AllPlan) -> dict[str, Part]:
    """The benchmarks and their sizes: with two cores of a CPU the full ones take about half an hour."""
    common: dict[str, Any] = {"device": plan.device, "threads": plan.threads}
    dtype = "both" if describe_machine(plan.device)["bf16_hardware"] else "float32"
    models = {**common, "dtype": dtype}
    sizes = _quick_sizes() if plan.quick else _full_sizes()
    plans = {
        "models": ModelsPlan(**models, **sizes["models"]),
        "models_kept": ModelsPlan(**models, allocator="kept", **{**sizes["models"], "memory": False}),
        "models_compiled": ModelsPlan(**models, compile=True, **sizes["models_compiled"]),
        "train": TrainPlan(**models, **sizes["train"]),
        "ops": OpsPlan(**common, **sizes["ops"]),
        "extract": ExtractBenchmark(**common, **sizes["extract"]),
        "sgcl": SgclBenchmark(**common, **sizes["sgcl"]),
    }
    rest: dict[str, tuple[str, Any, Any, Any]] = {
        "models": ("Models, inference", run_models, format_models, _models_ratios),
        "models_kept": ("Models, inference, large blocks kept", run_models, format_models, _models_ratios),
        "models_compiled": ("Models, inference, torch.compile", run_models, format_models, _models_ratios),
        "train": ("Training steps, supervised and MAMIM", run_train, format_train, _train_ratios),
        "ops": ("Operators", run_ops, format_ops, _ops_ratios),
        "extract": ("Extraction of a slide", run_extract, format_extract, _extract_ratios),
        "sgcl": ("What SGCL costs besides the encoder", run_sgcl, format_sgcl, _sgcl_ratios),
    }
    parts = {}
    for name, (title, measure, show, ratios) in rest.items():
        parts[name] = Part(title, measure, plans[name], show, ratios)
    return parts


def _full_sizes() -> dict[str, dict[str, Any]]:
    return {
        "models": {"sizes": (224, 512, 1024), "rounds": 5, "budget_s": 60.0},
        # Compiling takes a minute or two for each model and size.
        "models_compiled": {"sizes": (224,), "rounds": 5, "budget_s": 60.0, "memory": False},
        "train": {"rounds": 5, "budget_s": 90.0},
        "ops": {"rounds": 5, "budget_s": 20.0},
        "extract": {"rounds": 3, "tiles": 768},
        "sgcl": {"rounds": 3, "budget_s": 60.0},
    }


def _quick_sizes() -> dict[str, dict[str, Any]]:
    few = {"rounds": 1, "budget_s": 1.0}
    tiny = {"model": "test_ssmamba", "peers": ("test_convnext",), "sizes": (64,), "batch_size": 1, **few}
    tiny["memory"] = False
    cases = (
        OpCase("directional_scan", (1, 7, 7, 16), 1),
        OpCase("selective_scan", (1, 16, 49), 1),
        OpCase("causal_conv1d", (1, 16, 49), 4),
    )
    step = {"model": "test_ssmamba", "peer": "vit_tiny_patch16_224", "peers": ("test_convnext",), "size": 64}
    return {
        "models": tiny,
        "models_compiled": tiny,
        "train": {**step, "batch_size": 2, "workers": 0, "wait_steps": 1, **few},
        "ops": {"cases": cases, **few},
        "extract": {"model": "test_ssmamba", "tiles": 64, "tile_size": 64, "batch_size": 8, "workers": 0, "rounds": 1},
        "sgcl": {"vectors": 400, "embed_dim": 8, "batch_size": 4, "memory": False, **few},
    }


def run_all(plan: AllPlan, progress: Progress = lambda line: None) -> dict:
    """Run every benchmark.

    One that cannot run here (a package is missing, memory is short) is left out with its reason; the others go on.
    All but the first run with large blocks kept (engine.process_memory), as the commands do whose work they measure:
    this process keeps them from then on.

    Returns:
        {"benchmark", "machine", "settings", "seconds", "parts": name -> its report with "seconds", or {"reason"},
        "ratios": [{"part", "what", "ratio_of", "ratio"}, ...]}, ready for JSON.

    Raises:
        ValueError: a device that is not here, or a number of threads out of range.
    """
    require_device(plan.device)
    with use_threads(plan.threads):
        machine = describe_machine(plan.device)
    begun, reports, ratios = time.monotonic(), {}, []
    for name, part in make_parts(plan).items():
        if name != "models":
            # There is no way back, so "models" comes first.
            keep_large_blocks()
        progress(f"== {part.title}")
        start = time.monotonic()
        report = _measure(part, progress)
        reports[name] = {**report, "seconds": time.monotonic() - start}
        if "reason" not in report:
            keys = ("what", "ratio_of", "ratio")
            ratios += [{"part": name, **dict(zip(keys, row))} for row in part.ratios(report) if row[2] is not None]
    return {
        "benchmark": "all",
        "machine": machine,
        "settings": asdict(plan),
        "seconds": time.monotonic() - begun,
        "parts": reports,
        "ratios": ratios,
    }


def _measure(part: Part, progress: Progress) -> dict:
    try:
        return part.measure(part.plan, progress)
    except (ImportError, OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        reason = one_line(error)
        progress(f"{part.title}: not measured: {reason}")
        return {"reason": reason}


def _ops_ratios(report: dict) -> Iterator[tuple[str, str, float | None]]:
    for row in report["results"]:
        ratio = row.get("times_faster_than_reference")
        if row["reason"] is None and row["backend"] != "reference":
            yield f"{row['case']}, {row['pass']}", f"speed of {row['backend']} over the definition's", ratio


def _models_ratios(report: dict) -> Iterator[tuple[str, str, float | None]]:
    ours = report["settings"]["model"]
    for row in report["results"]:
        if row["reason"] is None:
            what = f"{row['size']} px, {row['dtype']}"
            yield what, f"images/s of {ours} over {row['model']} ({row['mode']})", row["ours_over_peer"]
            yield what, f"images/s of {ours} over {row['model']} (both eager)", row["eager_over_peer"]


def _train_ratios(report: dict) -> Iterator[tuple[str, str, float | None]]:
    settings = report["settings"]
    for row in report["results"]:
        if row["reason"] is None:
            ours, theirs = ("MAMIM", "MAE") if row["method"] == "mae" else (row["method"], row["method"])
            ratio_of = f"tiles/s of {settings['model']} ({ours}) over {row['model']} ({theirs})"
            yield f"{row['size']} px, {row['dtype']}", ratio_of, row["ours_over_peer"]
    yield f"data, {report['data']['dtype']}", "time waited for data over all time", report["data"]["wait_share"]


def _extract_ratios(report: dict) -> Iterator[tuple[str, str, float | None]]:
    yield "end to end", "tiles/s over those of the model alone", report["summary"]["share"]
    yield "data", "time waited for tiles over all time", report["summary"]["wait_share"]


def _sgcl_ratios(report: dict) -> Iterator[tuple[str, str, float | None]]:
    for row in report["results"]:
        yield f"{row['piece']}, per {row['per']}", "time over that for a quarter of the tiles", _over_quarter(row)


def _over_quarter(row: Mapping[str, Any]) -> float | None:
    return row["seconds"] / row["quarter_seconds"] if row["quarter_seconds"] else None


def markdown_all(report: dict) -> str:
    """The report of `run_all` as a page: the machine, all ratios, then each benchmark's own table."""
    machine, settings = report["machine"], report["settings"]
    parts = make_parts(AllPlan(**settings))
    rows = [
        (parts[row["part"]].title, row["what"], row["ratio_of"], f"{row['ratio']:.2f}") for row in report["ratios"]
    ]
    threads = "" if settings["threads"] is None else f" --threads {settings['threads']}"
    device = "" if settings["device"] == "cpu" else f" --device {settings['device']}"
    command = f"ssmamba benchmark all{' --quick' if settings['quick'] else ''}{device}{threads}"
    warning = "Tiny models on small inputs: the numbers show that all runs, and nothing else.\n\n"
    lines = [
        f"{TITLE}\n",
        f"`{command}`, {report['seconds'] / 60:.1f} minutes, {machine['date']}\n",
        f"{machine['cores']} cores, Python {machine['python']}, {machine['system']}, "
        f"ssmamba_models {machine['ssmamba_models']}\n",
        f"{machine_text(machine)}\n",
        f"{warning if settings['quick'] else ''}## Ratios\n",
        markdown_table(("benchmark", "case", "ratio of", "ratio"), rows) + "\n",
    ]
    for name, part in parts.items():
        found = report["parts"][name]
        text = f"not measured: {found['reason']}" if "reason" in found else f"```\n{part.show(found)}\n```"
        lines.append(f"## {part.title}\n\n{text}\n\n{found['seconds']:.0f} s\n")
    return "\n".join(lines)
