"""A model against its peers: images per second, memory and size, all in one run."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import timm
import torch

from ssmamba_models.benchmark.defaults import (
    ALLOCATORS,
    DEFAULT_MODEL,
    DEFAULT_PEERS,
    DEFAULT_SIZES,
    DTYPES,
    LAYOUTS,
)
from ssmamba_models.benchmark.machine import describe_machine, machine_line, require_device
from ssmamba_models.benchmark.memory import measure_peak_mib
from ssmamba_models.benchmark.model_step import ModelStep, StepSpec
from ssmamba_models.benchmark.report import format_table, optional_number
from ssmamba_models.benchmark.timing import Timing, best_of, speedup, time_interleaved
from ssmamba_models.engine.process_memory import keep_large_blocks, large_blocks_kept
from ssmamba_models.notice import first_line
from ssmamba_models.threads import use_threads

REFERENCE_SIZE = 512  # time per pixel is quoted against that at this size

# Pixels in a batch, unless one image of the largest size has more: enough to keep the device busy.
BATCH_PIXELS = {"cpu": 1024 * 1024, "cuda": 256 * 224 * 224}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ModelsPlan:
    """What to measure.

    Attributes:
        model: the model whose ratio to every peer is given.
        peers: models known to timm, measured in the same rounds.
        sizes: heights and widths of the square images, in pixels.
        batch_size: images per batch; None holds the pixels per batch about constant over `sizes`.
        device: "cpu" or "cuda".
        dtype: "float32", or "bfloat16" for autocast.
        train: measure training steps, not inference.
        compile: measure each model through torch.compile as well.
        layout: of images and convolution weights; "auto" gives each model the one that it runs faster in.
        allocator: "system" leaves malloc as this process has it; "kept" makes the process keep large freed blocks, as
            `ssmamba extract` and the other commands do (engine.process_memory), from here on. It decides much for
            models of large activations, so both are worth knowing. Settings of the report say what was the case.
        memory: measure peak memory (a fresh process for each model and size on a CPU).
        rounds: samples per model and size.
        threads: CPU threads inside an operator; None for the cores that this process may use.
        budget_s: seconds per size after which no further round begins.
    """

    model: str = DEFAULT_MODEL
    peers: Sequence[str] = DEFAULT_PEERS
    sizes: Sequence[int] = DEFAULT_SIZES
    batch_size: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    train: bool = False
    compile: bool = False
    layout: str = "auto"
    allocator: str = "system"
    memory: bool = True
    rounds: int = 7
    threads: int | None = None
    budget_s: float = 120.0

    def batch_for(self, size: int) -> int:
        """Images per batch at `size` pixels: as many as fill the pixels of a batch, at least one."""
        if self.batch_size is not None:
            return self.batch_size
        pixels = max(BATCH_PIXELS[torch.device(self.device).type], max(self.sizes) ** 2)
        return max(1, pixels // size**2)


@dataclass
class Entry:
    """One model at one size, on its way to becoming a row. `reason` says why there is no timing."""

    spec: StepSpec
    timing: Timing | None = None
    parameters_m: float | None = None
    gmacs: float | None = None
    peak_mib: float | None = None
    ours_over_peer: float | None = None
    reason: str | None = None
    step: ModelStep | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return f"{self.spec.name} (compiled)" if self.spec.compiled else self.spec.name

    @property
    def images_per_s(self) -> float:
        return self.spec.batch_size / self.timing.median_ms * 1e3

    @property
    def ns_per_pixel(self) -> float:
        return self.timing.median_ms * 1e6 / (self.spec.batch_size * self.spec.size**2)


def run_models(plan: ModelsPlan, progress: Progress = lambda line: None) -> dict:
    """Measure every model of `plan` at every size.

    A model that cannot take a size gets a row that says why. `progress` is told what is being done.

    Returns:
        {"benchmark", "machine", "settings", "results": [row, ...]}, ready for JSON; see `_as_row`.

    Raises:
        ValueError: for a model unknown to timm, a size or number below one, a device that is not here, or blocks that
            cannot be kept.
    """
    _check(plan)
    if plan.allocator == "kept" and not keep_large_blocks():
        raise ValueError(
            "--allocator kept: malloc does not keep large blocks here: it is not glibc's, or an old one, or tuned by "
            "GLIBC_TUNABLES or MALLOC_* in the environment; unset these, or use --allocator system"
        )
    with use_threads(plan.threads) as threads:
        machine = describe_machine(plan.device)
        specs = _choose_layouts(plan, threads, progress)
        entries = [entry for size in plan.sizes for entry in _measure_size(plan, size, specs, progress)]
    return {
        "benchmark": "models",
        "machine": machine,
        "settings": _settings(plan, threads),
        "results": [_as_row(entry, entries) for entry in entries],
    }


def format_models(report: dict) -> str:
    """The report of `run_models` as a table for a person, no wider than a page."""
    headers = ("model", "px", "batch", "img/s", "+-%", "MiB", "M par", "GMACs", "ns/px", "of 512", "ours/it")
    rows = [_table_row(row) for row in report["results"]]
    settings = report["settings"]
    task = "training steps" if settings["train"] else "inference"
    blocks = "large blocks kept" if settings["large_blocks_kept"] else "malloc as it comes"
    notes = (
        f"{task}, {settings['dtype']}; {machine_line(report['machine'])}\n"
        f"MiB: peak of one batch on top of the weights; {blocks}. of 512: time per pixel over that at 512 px.\n"
        f"ours/it: throughput of {settings['model']} over that model's. +-%: half the quartiles' distance."
    )
    return f"{format_table(headers, rows)}\n\n{notes}"


def _check(plan: ModelsPlan) -> None:
    names = [plan.model, *plan.peers]
    for name in names:
        require_model(name)
    if len(set(names)) < len(names):
        raise ValueError(f"each model can be measured once, got {', '.join(names)}; drop the repeated peer")
    counts = [("size", size) for size in plan.sizes]
    counts += [("batch size", plan.batch_size), ("rounds", plan.rounds)]
    for what, value in counts:
        if value is not None and value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    if not plan.sizes:
        raise ValueError("no size to measure at; name at least one, such as 224")
    for what, known in (("dtype", DTYPES), ("layout", LAYOUTS), ("allocator", ALLOCATORS)):
        value = getattr(plan, what)
        if value not in known:
            raise ValueError(f"{what} {value!r} is unknown; expected one of {', '.join(known)}")
    require_device(plan.device)


def require_model(name: str) -> None:
    """Raise ValueError for a name that timm does not know; the message names near ones."""
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    cure = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names those that there are"
    raise ValueError(f"model {name!r} is unknown to timm {timm.__version__}; {cure}")


def _settings(plan: ModelsPlan, threads: int) -> dict:
    settings = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    settings |= {"peers": list(plan.peers), "sizes": list(plan.sizes), "threads": threads}
    return {**settings, "large_blocks_kept": large_blocks_kept()}


def _choose_layouts(plan: ModelsPlan, threads: int, progress: Progress) -> list[StepSpec]:
    """A spec for each contender. Some convolutional peers run far faster in one layout than in the other, and
    a comparison with the slower one would flatter us; the smallest size decides for all."""
    size = min(plan.sizes)
    specs = []
    for name in (plan.model, *plan.peers):
        spec = StepSpec(name, size, plan.batch_for(size), plan.device, plan.dtype, plan.train, threads=threads)
        if plan.layout == "auto":
            progress(f"{name}: choosing a layout")
            spec = _faster_layout(spec)
        else:
            spec = replace(spec, channels_last=plan.layout == "channels_last")
        specs.append(spec)
        if plan.compile:
            specs.append(replace(spec, compiled=True))
    return specs


def _faster_layout(spec: StepSpec) -> StepSpec:
    candidates = [replace(spec, channels_last=channels_last) for channels_last in (False, True)]
    try:
        return min(candidates, key=lambda candidate: best_of(ModelStep(candidate), device=spec.device))
    except Exception:
        return spec  # it cannot take this size; its row will say why


def _measure_size(plan: ModelsPlan, size: int, specs: Sequence[StepSpec], progress: Progress) -> list[Entry]:
    entries = [Entry(replace(spec, size=size, batch_size=plan.batch_for(size))) for spec in specs]
    for entry in entries:
        progress(f"{entry.label} at {size} px: preparing")
        _prepare(entry, plan.memory)
    running = {entry.label: entry for entry in entries if entry.reason is None}
    progress(f"{size} px: timing {', '.join(running) or 'nothing'}")
    timings = time_interleaved(
        {label: entry.step for label, entry in running.items()},
        device=plan.device,
        rounds=plan.rounds,
        budget_s=plan.budget_s,
    )
    for label, timing in timings.items():
        running[label].timing = timing
    _set_ratios(entries, plan.model)
    for entry in entries:
        entry.step = None  # frees the model before those of the next size are made
    return entries


def _prepare(entry: Entry, memory: bool) -> None:
    """Build the step and find all that is not a time; note why, where the model does not take the size."""
    try:
        step = ModelStep(entry.spec)
        entry.parameters_m = step.parameters_m
        entry.gmacs = step.gmacs()
        step()
        if memory:
            entry.peak_mib = measure_peak_mib(entry.spec, kept=large_blocks_kept())
        entry.step = step
    except Exception as error:  # timm's models say no in many ways: AssertionError, RuntimeError, ...
        entry.reason = first_line(error)


def _set_ratios(entries: Sequence[Entry], model: str) -> None:
    """Throughput of our model over each peer's, compiled against compiled and eager against eager."""
    for ours in entries:
        if ours.spec.name != model or ours.timing is None:
            continue
        for peer in entries:
            comparable = peer.spec.name != model and peer.spec.compiled == ours.spec.compiled
            if comparable and peer.timing is not None:
                peer.ours_over_peer = speedup(ours.timing, peer.timing)


def _as_row(entry: Entry, entries: Sequence[Entry]) -> dict:
    """A row of the report: what was run, then either its measurements or the reason for having none."""
    spec = entry.spec
    row = {
        "model": spec.name,
        "compiled": spec.compiled,
        "size": spec.size,
        "batch_size": spec.batch_size,
        "channels_last": spec.channels_last,
        "parameters_m": entry.parameters_m,
        "gmacs": entry.gmacs,
        "reason": entry.reason,
    }
    if entry.timing is None:
        return row
    return {
        **row,
        "images_per_s": entry.images_per_s,
        "ns_per_pixel": entry.ns_per_pixel,
        "ns_per_pixel_over_512": _over_reference_size(entry, entries),
        "peak_mib": entry.peak_mib,
        "ours_over_peer": entry.ours_over_peer,
        **entry.timing.as_dict(),
    }


def _over_reference_size(entry: Entry, entries: Sequence[Entry]) -> float | None:
    for other in entries:
        if other.spec.size == REFERENCE_SIZE and other.label == entry.label and other.timing is not None:
            return entry.ns_per_pixel / other.ns_per_pixel
    return None


def _table_row(row: dict) -> tuple[str, ...]:
    name = f"{row['model']}*" if row["compiled"] else row["model"]
    start = (name, str(row["size"]), str(row["batch_size"]))
    if row["reason"] is not None:
        return (*start, f"not measured: {row['reason']}")
    lower, upper = row["quartiles_ms"]
    return (
        *start,
        f"{row['images_per_s']:.2f}",
        f"{(upper - lower) / 2 / row['median_ms'] * 100:.1f}",
        optional_number(row["peak_mib"], ".0f"),
        f"{row['parameters_m']:.2f}",
        f"{row['gmacs']:.2f}",
        f"{row['ns_per_pixel']:.0f}",
        optional_number(row["ns_per_pixel_over_512"], ".2f"),
        optional_number(row["ours_over_peer"], ".2f"),
    )
