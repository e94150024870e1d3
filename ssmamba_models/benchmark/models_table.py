"""The report of `run_models` as tables for a person: the contenders, then the ratios side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ssmamba_models.benchmark.machine import machine_text
from ssmamba_models.benchmark.report import format_table, optional_number

Row = Mapping[str, Any]

ALLOCATOR_NAMES = {"system": "malloc as it comes", "kept": "large blocks kept"}

_HEADERS = ("model", "", "px", "batch", "img/s", "+-%", "MiB", "M par", "GMACs", "ns/px", "of 512", "build s")
_RATIO_HEADERS = ("times the images/s of", "px", "eager", "compiled", "both eager")


def format_models(report: dict) -> str:
    """The report of `run_models` as text, no wider than a page."""
    settings, rows = report["settings"], report["results"]
    task = "training steps" if settings["train"] else "inference"
    parts = []
    for (allocator, dtype), group in groupby(rows, lambda row: (row["allocator"], row["dtype"])):
        found = list(group)
        table = format_table(_HEADERS, [_table_row(row) for row in found], left=2)
        note = f"{task}, {dtype}, {ALLOCATOR_NAMES[allocator]}"
        parts.append(f"{table}\n\n{note}\n\n{_ratio_table(settings['model'], found)}".rstrip())
    notes = (
        f"{machine_text(report['machine'], [row['dtype'] for row in rows])}\n"
        "MiB: peak of one batch on top of the weights. of 512: time per pixel over that at 512 px.\n"
        "+-%: half the quartiles' distance. build s: seconds of optimize, or of torch.compile and its first batch.\n"
        f"Ratios: {settings['model']}, as commands run it, over that model eager, and compiled; both eager."
    )
    return "\n\n".join([*parts, notes])


def _ratio_table(ours: str, rows: Sequence[Row]) -> str:
    peers = dict.fromkeys((row["size"], row["model"]) for row in rows if row["reason"] is None)
    lines = []
    for size, model in peers:
        found = {row["mode"]: row for row in rows if (row["size"], row["model"]) == (size, model)}
        ratios = [_ratio(found, "eager", "ours_over_peer"), _ratio(found, "compiled", "ours_over_peer")]
        ratios.append(_ratio(found, "eager", "eager_over_peer"))
        if any(ratio is not None for ratio in ratios):
            lines.append((model, str(size), *(optional_number(ratio, ".2f") for ratio in ratios)))
    return format_table(_RATIO_HEADERS, lines) if lines else ""


def _ratio(found: Mapping[str, Row], mode: str, key: str) -> float | None:
    return found[mode].get(key) if mode in found else None


def spread(row: Row) -> str:
    """Half the distance of the quartiles, in percent of the median."""
    lower, upper = row["quartiles_ms"]
    return f"{(upper - lower) / 2 / row['median_ms'] * 100:.1f}"


def _table_row(row: Row) -> tuple[str, ...]:
    start = (row["model"], row["mode"], str(row["size"]), str(row["batch_size"]))
    if row["reason"] is not None:
        return (*start, f"not measured: {row['reason']}")
    return (
        *start,
        f"{row['images_per_s']:.2f}",
        spread(row),
        optional_number(row["peak_mib"], ".0f"),
        f"{row['parameters_m']:.2f}",
        f"{row['gmacs']:.2f}",
        f"{row['ns_per_pixel']:.0f}",
        optional_number(row["ns_per_pixel_over_512"], ".2f"),
        optional_number(row["build_s"], ".1f"),
    )
