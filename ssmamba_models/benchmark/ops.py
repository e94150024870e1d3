"""Every backend of every scan against its naive definition: how fast, and how exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ssmamba_models.benchmark.bandwidth import copy_bandwidth
from ssmamba_models.benchmark.defaults import OPS
from ssmamba_models.benchmark.machine import describe_machine, machine_text, require_device
from ssmamba_models.benchmark.op_cases import CASES, OpCase, OpInputs, make_inputs
from ssmamba_models.benchmark.op_contenders import (
    CONV1D,
    PASSES,
    REFERENCE,
    Contender,
    Outcome,
    choose_backends,
    contenders_for,
    faster_reference,
    make_call,
)
from ssmamba_models.benchmark.report import format_table, optional_number
from ssmamba_models.benchmark.timing import Timing, speedup, time_interleaved
from ssmamba_models.notice import first_line
from ssmamba_models.threads import use_threads

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A backward alone is of interest next to a memory floor; it is timed where that is what limits.
DEFAULT_PASSES = {"cpu": ("forward", "forward+backward"), "cuda": PASSES}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class OpsPlan:
    """What to measure.

    Attributes:
        ops: names of operators; None for all.
        backends: names of backends; None for all that can run. The reference and torch's conv1d always run.
        device: "cpu" or "cuda".
        dtype: of the tensors that grow with the length: "float32", "bfloat16" or "float16".
        rounds: samples per contender.
        threads: CPU threads inside an operator; None for the cores that this process may use.
        budget_s: seconds per case and pass after which no further round begins.
        cases: the problems; None for those of `CASES` on the device.
        passes: of `PASSES`; None for those of `DEFAULT_PASSES` on the device.
    """

    ops: Sequence[str] | None = None
    backends: Sequence[str] | None = None
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 7
    threads: int | None = None
    budget_s: float = 60.0
    cases: Sequence[OpCase] | None = None
    passes: Sequence[str] | None = None


@dataclass
class Entry:
    """One contender in one pass of one case, on its way to becoming a row. `reason` says why it has no timing."""

    contender: Contender
    call: Callable[[], Outcome] | None = field(default=None, repr=False)
    error: float | None = None
    timing: Timing | None = None
    reason: str | None = None


def run_ops(plan: OpsPlan, progress: Progress = lambda line: None) -> dict:
    """Measure every backend of `plan` on every case.

    Each contender's result is first compared with the definition in float64. One that fails, or whose result is not
    finite, gets a row that says so. `progress` is told what is being done.

    Returns:
        {"benchmark", "machine", "settings", "copy_gb_per_s", "not_run", "results": [row, ...]}, ready for JSON.
        `not_run` maps the backends that cannot run here to the reason; see `_as_row` for a row.

    Raises:
        ValueError: for an unknown operator, backend, dtype or pass, a backend that cannot run, or a device that is
            not here.
    """
    _check(plan)
    device = require_device(plan.device)
    backends, not_run = choose_backends(plan.backends, device)
    with use_threads(plan.threads) as threads:
        machine = describe_machine(device)
        bandwidth = copy_bandwidth(device)
        results = [row for case in _cases(plan) for row in _measure_case(plan, case, backends, bandwidth, progress)]
    return {
        "benchmark": "ops",
        "machine": machine,
        "settings": {"device": plan.device, "dtype": plan.dtype, "rounds": plan.rounds, "threads": threads},
        "copy_gb_per_s": bandwidth / 1e9,
        "not_run": not_run,
        "results": results,
    }


def format_ops(report: dict) -> str:
    """The report of `run_ops` as a table for a person, no wider than a page."""
    headers = ("pass", "backend", "ms", "+-%", "x reference", "x conv1d", "error", "of floor")
    rows, title = [], None
    for row in report["results"]:
        if row["case"] != title:
            title = row["case"]
            rows.append((title,))
        rows.append(_table_row(row))
    notes = [
        f"{report['settings']['dtype']}; {machine_text(report['machine'])}",
        "x: times faster. error: largest difference from the float64 definition over its largest value.",
        f"of floor: time over that of moving the bytes once at the {report['copy_gb_per_s']:.0f} GB/s at which this",
        "device copies; on a CPU, data that stay in the caches beat it. +-%: half the quartiles' distance.",
        *(f"{name} not run: {why}" for name, why in report["not_run"].items()),
    ]
    return "\n".join([format_table(headers, rows, left=2), "", *notes])


def _check(plan: OpsPlan) -> None:
    known = {"operator": (plan.ops, OPS), "pass": (plan.passes, PASSES), "dtype": ([plan.dtype], tuple(DTYPES))}
    for what, (values, names) in known.items():
        for value in values or ():
            if value not in names:
                raise ValueError(f"{what} {value!r} is unknown; expected one of {', '.join(names)}")
    if plan.rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {plan.rounds}")


def _cases(plan: OpsPlan) -> list[OpCase]:
    cases = CASES[torch.device(plan.device).type] if plan.cases is None else plan.cases
    return [case for case in cases if not plan.ops or case.op in plan.ops]


def _measure_case(
    plan: OpsPlan, case: OpCase, backends: list[str], bandwidth: float, progress: Progress
) -> Iterator[dict]:
    inputs = make_inputs(case, DTYPES[plan.dtype], plan.device)
    naive, *others = contenders_for(case.op, backends)
    naive = faster_reference(naive, case, DTYPES[plan.dtype], torch.device(plan.device))
    progress(f"{case.label}, float64 definition")
    y, *gradients = make_call(naive, inputs.in_float64(), "forward+backward")()
    truth = {"forward": (y,), "backward": tuple(gradients), "forward+backward": (y, *gradients)}
    for which in plan.passes or DEFAULT_PASSES[torch.device(plan.device).type]:
        progress(f"{case.label}, {which}")
        entries = [_prepare(contender, inputs, which, truth[which]) for contender in (naive, *others)]
        _time(plan, entries)
        floor_ms = inputs.least_bytes(which) / bandwidth * 1e3
        for entry in entries:
            yield _as_row(case, which, entry, entries, inputs.least_bytes(which), floor_ms)


def _prepare(contender: Contender, inputs: OpInputs, which: str, truth: Outcome) -> Entry:
    """Run a contender once and judge its result; note why, where it cannot run or is wrong beyond measure."""
    entry = Entry(contender)
    try:
        entry.call = make_call(contender, inputs, which)
        entry.error = _relative_error(entry.call(), truth)
    except Exception as error:  # a backend may lack an operator, a dtype or memory, each in its own way
        entry.reason = first_line(error)
        return entry
    if entry.error is None:
        entry.reason = "its result is not finite"
    return entry


def _relative_error(outcome: Outcome, truth: Outcome) -> float | None:
    """The largest difference over the largest value, tensor by tensor, and the worst of these; None if a result is
    not finite."""
    worst = 0.0
    for got, exact in zip(outcome, truth, strict=True):
        if not got.isfinite().all():
            return None
        scale = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        worst = max(worst, float((got.double() - exact).abs().max() / scale))
    return worst


def _time(plan: OpsPlan, entries: Sequence[Entry]) -> None:
    calls = {entry.contender.name: entry.call for entry in entries if entry.reason is None}
    timings = time_interleaved(calls, device=plan.device, rounds=plan.rounds, budget_s=plan.budget_s)
    for entry in entries:
        entry.timing = timings.get(entry.contender.name)


def _as_row(
    case: OpCase, which: str, entry: Entry, entries: Sequence[Entry], least_bytes: int, floor_ms: float
) -> dict:
    """A row of the report: what was run, then its measurements or the reason for having none."""
    row = {
        "case": case.label,
        "op": case.op,
        "shape": list(case.shape),
        "pass": which,
        "backend": entry.contender.name,
        "reason": entry.reason,
    }
    if entry.timing is None:
        return row
    return {
        **row,
        "threads": entry.contender.threads or torch.get_num_threads(),
        "times_faster_than_reference": _speedup_over(entry, entries, REFERENCE),
        "times_faster_than_conv1d": _speedup_over(entry, entries, CONV1D),
        "max_relative_error": entry.error,
        "least_bytes": least_bytes,
        "floor_ms": floor_ms,
        "time_over_floor": entry.timing.median_ms / floor_ms,
        **entry.timing.as_dict(),
    }


def _speedup_over(entry: Entry, entries: Sequence[Entry], name: str) -> float | None:
    for other in entries:
        if other.contender.name == name and other.timing is not None:
            return speedup(entry.timing, other.timing)
    return None


def _table_row(row: dict) -> tuple[str, ...]:
    start = (row["pass"], row["backend"])
    if row["reason"] is not None:
        return (*start, f"not measured: {row['reason']}")
    lower, upper = row["quartiles_ms"]
    return (
        *start,
        f"{row['median_ms']:.3f}",
        f"{(upper - lower) / 2 / row['median_ms'] * 100:.1f}",
        optional_number(row["times_faster_than_reference"], ".2f"),
        optional_number(row["times_faster_than_conv1d"], ".2f"),
        f"{row['max_relative_error']:.0e}",
        f"{row['time_over_floor']:.1f}",
    )
