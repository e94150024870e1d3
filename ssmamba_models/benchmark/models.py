"""A model against its peers: images per second, memory and size, all in one run."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import timm
import torch

from ssmamba_models.benchmark.allocators import in_turn
from ssmamba_models.benchmark.defaults import (
    ALLOCATORS,
    DEFAULT_MODEL,
    DEFAULT_PEERS,
    DEFAULT_SIZES,
    DTYPE_CHOICES,
    LAYOUTS,
)
from ssmamba_models.benchmark.machine import describe_machine, require_device
from ssmamba_models.benchmark.memory import measure_peak_mib
from ssmamba_models.benchmark.model_step import DTYPES, ModelStep, StepSpec, count_work
from ssmamba_models.benchmark.timing import Timing, best_of, speedup, time_interleaved
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
        model: the model whose ratio to every peer is given: eager and, in inference on a CPU, as `optimize` makes it.
        peers: models known to timm, measured in the same rounds.
        sizes: heights and widths of the square images, in pixels.
        batch_size: images per batch; None holds the pixels per batch about constant over `sizes`.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16" (autocast over float32 weights), or "both", one after the other.
        train: measure training steps, not inference.
        compile: measure each model that is not optimized through torch.compile as well (inductor; frozen weights in
            inference).
        layout: of images and convolution weights; "auto" gives each model and dtype the one that it runs faster in.
        allocator: "system" leaves malloc as this process has it; "kept" makes the process keep large freed blocks, as
            `ssmamba extract` and the other commands do (engine.process_memory), from here on; "both" does one after the
            other. It decides much for models of large activations. Each row says which it was.
        memory: measure peak memory (a fresh process for each model and size on a CPU); not of what is compiled.
        rounds: samples of each contender.
        threads: CPU threads inside an operator; None for the cores that this process may use.
        budget_s: seconds per size, dtype and allocator after which no further round begins.
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

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those to compute in."""
        return DTYPES if self.dtype == "both" else (self.dtype,)

    def batch_for(self, size: int) -> int:
        """Images per batch at `size` pixels: as many as fill the pixels of a batch, at least one."""
        if self.batch_size is not None:
            return self.batch_size
        pixels = max(BATCH_PIXELS[torch.device(self.device).type], max(self.sizes) ** 2)
        return max(1, pixels // size**2)


@dataclass
class Entry:
    """One contender on its way to becoming a row. `reason` says why there is no timing."""

    spec: StepSpec
    allocator: str
    timing: Timing | None = None
    parameters_m: float | None = None
    gmacs: float | None = None
    build_s: float | None = None
    peak_mib: float | None = None
    ours_over_peer: float | None = None
    eager_over_peer: float | None = None
    reason: str | None = None
    step: ModelStep | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return self.spec.name if self.spec.mode == "eager" else f"{self.spec.name} ({self.spec.mode})"

    @property
    def ns_per_pixel(self) -> float:
        return self.timing.median_ms * 1e6 / (self.spec.batch_size * self.spec.size**2)

    def is_like(self, other: Entry) -> bool:
        """Whether only the size differs."""
        keys = [(e.label, e.spec.dtype, e.allocator) for e in (self, other)]
        return keys[0] == keys[1]


def run_models(plan: ModelsPlan, progress: Progress = lambda line: None) -> dict:
    """Measure every model of `plan` at every size, in every dtype, with every allocator.

    The contenders of one size, dtype and allocator take turns. One that cannot be run gets a row that says why.
    `progress` is told what is being done.

    Returns:
        {"benchmark", "machine", "settings", "results": [row, ...]}, ready for JSON; see `_as_row`.

    Raises:
        ValueError: for a model unknown to timm, a size or number below one, a device that is not here, or blocks that
            cannot be kept.
    """
    _check(plan)
    with use_threads(plan.threads) as threads:
        machine = describe_machine(plan.device)
        entries = list(_measure(plan, threads, progress))
    settings = {**asdict(plan), "peers": list(plan.peers), "sizes": list(plan.sizes), "threads": threads}
    return {
        "benchmark": "models",
        "machine": machine,
        "settings": settings,
        "results": [_as_row(entry, entries) for entry in entries],
    }


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
    for what, known in (("dtype", DTYPE_CHOICES), ("layout", LAYOUTS), ("allocator", ALLOCATORS)):
        require_known(what, getattr(plan, what), known)
    require_device(plan.device)


def require_known(what: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError for a value of the option `what` that is none of the known ones."""
    if value not in known:
        raise ValueError(f"{what} {value!r} is unknown; expected one of {', '.join(known)}")


def require_model(name: str) -> None:
    """Raise ValueError for a name that timm does not know; the message names near ones."""
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    cure = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names those that there are"
    raise ValueError(f"model {name!r} is unknown to timm {timm.__version__}; {cure}")


def _measure(plan: ModelsPlan, threads: int, progress: Progress) -> Iterator[Entry]:
    specs: dict[str, list[StepSpec]] = {}
    for allocator in in_turn(plan.allocator):
        for dtype in plan.dtypes:
            if dtype not in specs:
                specs[dtype] = list(_contenders(plan, dtype, threads, progress))
            for size in plan.sizes:
                group = [replace(spec, size=size, batch_size=plan.batch_for(size)) for spec in specs[dtype]]
                yield from _measure_group(plan, [Entry(spec, allocator) for spec in group], progress)


def _contenders(plan: ModelsPlan, dtype: str, threads: int, progress: Progress) -> Iterator[StepSpec]:
    """A spec for each. Some convolutional peers run far faster in one layout than in the other, and a comparison with
    the slower one would flatter us; the smallest size decides for all."""
    size = min(plan.sizes)
    for name in (plan.model, *plan.peers):
        eager = StepSpec(name, size, plan.batch_for(size), plan.device, dtype, plan.train, threads=threads)
        eager = replace(eager, channels_last=plan.layout == "channels_last")
        optimized = _is_optimized(plan, name)
        modes = [replace(eager, mode="optimized"), eager] if optimized else [eager]
        if plan.layout == "auto":
            progress(f"{name}, {dtype}: choosing a layout")
            modes = [_faster_layout(spec) for spec in modes]
        yield from modes
        if plan.compile and not optimized:
            yield replace(modes[-1], mode="compiled")


def _is_optimized(plan: ModelsPlan, name: str) -> bool:
    # As the commands do: on a GPU they run the model itself.
    return name == plan.model and not plan.train and torch.device(plan.device).type == "cpu"


def _faster_layout(spec: StepSpec) -> StepSpec:
    candidates = [replace(spec, channels_last=channels_last) for channels_last in (False, True)]
    try:
        return min(candidates, key=lambda candidate: best_of(ModelStep(candidate), device=spec.device, tries=2))
    except Exception:
        return spec  # it cannot take this size; its row will say why


def _measure_group(plan: ModelsPlan, entries: Sequence[Entry], progress: Progress) -> Sequence[Entry]:
    """Time the contenders of one size, dtype and allocator in turn."""
    first = entries[0]
    where = f"{first.spec.size} px, {first.spec.dtype}, {first.allocator} malloc"
    if plan.compile:
        torch.compiler.reset()  # frees what was compiled for the last size
    for entry in entries:
        progress(f"{entry.label} at {where}: preparing")
        _prepare(entry, plan.memory)
        if entry.build_s is not None:
            progress(f"{entry.label} at {where}: {entry.spec.mode} in {entry.build_s:.1f} s")
    running = {entry.label: entry for entry in entries if entry.reason is None}
    progress(f"{where}: timing {', '.join(running) or 'nothing'}")
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
    spec = entry.spec
    try:
        entry.step = ModelStep(spec)
        entry.step()
        entry.build_s = entry.step.build_s
        entry.parameters_m, entry.gmacs = count_work(spec.name, spec.size, spec.train)
        if memory and spec.mode != "compiled":
            entry.peak_mib = measure_peak_mib(spec, kept=entry.allocator == "kept")
    except Exception as error:  # timm's models say no in many ways: AssertionError, RuntimeError, ...
        entry.reason = first_line(error)


def _set_ratios(entries: Sequence[Entry], model: str) -> None:
    """Throughput of our model, as the commands run it, over every other contender's; eager over eager as well."""
    timed = [entry for entry in entries if entry.timing is not None]
    by_mode = {entry.spec.mode: entry for entry in timed if entry.spec.name == model}
    eager = by_mode.get("eager")
    # The commands run the model itself where `optimize` refuses it.
    ours = by_mode.get("optimized", eager)
    for entry in timed:
        if ours is not None and entry is not ours:
            entry.ours_over_peer = speedup(ours.timing, entry.timing)
        if eager is not None and entry.spec.mode == "eager" and entry.spec.name != model:
            entry.eager_over_peer = speedup(eager.timing, entry.timing)


def _as_row(entry: Entry, entries: Sequence[Entry]) -> dict:
    """A row of the report: what was run, then either its measurements or the reason for having none."""
    spec = entry.spec
    row = {
        "model": spec.name,
        "mode": spec.mode,
        "allocator": entry.allocator,
        "dtype": spec.dtype,
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
        "images_per_s": spec.batch_size / entry.timing.median_ms * 1e3,
        "ns_per_pixel": entry.ns_per_pixel,
        "ns_per_pixel_over_512": _over_reference_size(entry, entries),
        "build_s": entry.build_s,
        "peak_mib": entry.peak_mib,
        "ours_over_peer": entry.ours_over_peer,
        "eager_over_peer": entry.eager_over_peer,
        **entry.timing.as_dict(),
    }


def _over_reference_size(entry: Entry, entries: Sequence[Entry]) -> float | None:
    for other in entries:
        if other.spec.size == REFERENCE_SIZE and other.is_like(entry) and other.timing is not None:
            return entry.ns_per_pixel / other.ns_per_pixel
    return None
