"""Extraction from end to end against the model alone, and the memory that it takes, on a synthetic slide."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssmamba_models.benchmark.defaults import DEFAULT_MODEL
from ssmamba_models.benchmark.machine import describe_machine, machine_text, require_device
from ssmamba_models.benchmark.memory import lower_high_water_mark
from ssmamba_models.benchmark.report import format_table
from ssmamba_models.engine.encoder import RandomWeightsWarning
from ssmamba_models.threads import use_threads
from ssmamba_models.wsi.dry_run import measure_speed
from ssmamba_models.wsi.extract import extract_slides
from ssmamba_models.wsi.extract_plan import ExtractPlan

# A TIFF tile of the synthetic slide, px, and how many different ones there are.
_SIDE, _KINDS = 512, 16
_MPP = 0.5
_MIB = 2**20

# The model alone is timed before and after each run, for a quarter of what the run should take, within these bounds: a
# shared machine's speed varies by a fifth from one batch to the next, and a run is the mean of many.
_LEAST_ALONE, _MOST_ALONE = 2.0, 15.0  # seconds

# Memory is looked at so often: a look takes half a millisecond of a core's time from the model.
_SAMPLE_SECONDS = 0.2

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExtractBenchmark:
    """What to measure.

    Attributes:
        model: the encoder, with random weights.
        tiles: how many the synthetic slide has at least; 100,000 shows that memory does not grow with it.
        tile_size: side of a tile, px; also of the model's input.
        batch_size: tiles per forward pass.
        workers: processes that read tiles; None chooses by the machine.
        device: "cpu" or "cuda".
        rounds: runs, each between two timings of the model alone.
        threads: CPU threads inside an operator; None for the cores that this process may use.
    """

    model: str = DEFAULT_MODEL
    tiles: int = 256
    tile_size: int = 224
    batch_size: int = 32
    workers: int | None = None
    device: str = "cpu"
    rounds: int = 3
    threads: int | None = None


def run_extract(plan: ExtractBenchmark, progress: Progress = lambda line: None) -> dict:
    """Extract a synthetic slide, in turn with the model alone on batches of the same size.

    Returns:
        {"benchmark", "machine", "settings", "slide": {width, height}, "results": [a row per round], "summary"}, ready
        for JSON. A row holds tiles, tiles_per_s, alone_per_s (the model, the mean of before and after), share (of
        the two), wait_share, and peak_mib (of this process and its reading processes; None where the system does not
        tell). The summary has their medians, the highest peak_mib, and added_mib: that less what was held before the
        first run, the model included.

    Raises:
        ValueError: an unknown model, a number out of range, a device that is not here.
        ImportError: a package for slides is missing.
    """
    require_device(plan.device)
    for name in ("tiles", "tile_size", "batch_size", "rounds"):
        if getattr(plan, name) < 1:
            raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {getattr(plan, name)}")
    extraction = _extraction(plan)
    with use_threads(plan.threads) as threads, tempfile.TemporaryDirectory() as scratch:
        machine = describe_machine(plan.device)
        progress(f"drawing a slide of {plan.tiles:,} tiles")
        slide = Path(scratch) / "slide.tif"
        width, height = write_synthetic_slide(slide, plan.tiles * plan.tile_size**2)
        rows, before = _measure(plan, extraction, slide, progress)
    return {
        "benchmark": "extract",
        "machine": machine,
        "settings": {**asdict(plan), "threads": threads},
        "slide": {"width": width, "height": height},
        "results": rows,
        "summary": _summarise(rows, before),
    }


def _extraction(plan: ExtractBenchmark) -> ExtractPlan:
    return ExtractPlan(
        model=plan.model,
        mpp=_MPP,
        tile_size=plan.tile_size,
        img_size=plan.tile_size,
        batch_size=plan.batch_size,
        workers=plan.workers,
        device=plan.device,
    )


def _measure(
    plan: ExtractBenchmark, extraction: ExtractPlan, slide: Path, progress: Progress
) -> tuple[list[dict], float | None]:
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomWeightsWarning)
        encoder = extraction.load()
        seconds = plan.tiles / measure_speed(encoder, plan.batch_size, _LEAST_ALONE) / 4
        seconds = min(max(seconds, _LEAST_ALONE), _MOST_ALONE)
        alone = measure_speed(encoder, plan.batch_size, seconds)
        before = memory_mib()
        for number in range(plan.rounds):
            progress(f"round {number + 1} of {plan.rounds}")
            with _peak_memory() as peak:
                result = extract_slides(slide, slide.parent / f"job{number}", extraction, progress=False)
            if not result.done:
                reason = result.failed.get(slide.stem, "no tissue was found")
                raise ValueError(f"the synthetic slide gives no features ({reason})")
            after = measure_speed(encoder, plan.batch_size, seconds)
            rows.append(_row(result.timing, (alone + after) / 2, peak))
            alone = after
    return rows, before


def _row(timing: Any, alone: float, peak: list[float]) -> dict:
    return {
        "tiles": timing.tiles,
        "tiles_per_s": timing.tiles_per_second,
        "alone_per_s": alone,
        "share": timing.tiles_per_second / alone,
        "wait_share": timing.wait_share,
        "peak_mib": max(peak, default=None),
    }


def _summarise(rows: list[dict], before: float | None) -> dict:
    medians = {key: float(np.median([row[key] for row in rows])) for key in ("tiles_per_s", "alone_per_s", "share")}
    peaks = [row["peak_mib"] for row in rows if row["peak_mib"] is not None]
    peak = max(peaks, default=None)
    added = None if peak is None or before is None else peak - before
    waited = float(np.median([row["wait_share"] for row in rows]))
    return {**medians, "wait_share": waited, "peak_mib": peak, "added_mib": added}


def format_extract(report: dict) -> str:
    """The report of `run_extract` as a table for a person."""
    headers = ("tiles", "tiles/s", "alone/s", "share", "waits", "peak MiB")
    rows = [_table_row(row) for row in report["results"]]
    settings, summary, slide = report["settings"], report["summary"], report["slide"]
    added = "" if summary["added_mib"] is None else f"memory on top of the model: {summary['added_mib']:.0f} MiB\n"
    return (
        f"{format_table(headers, rows, left=0)}\n\n"
        f"end to end {summary['share']:.0%} of the model alone; it waited for tiles {summary['wait_share']:.1%}\n"
        f"{added}"
        f"{settings['model']}, tiles of {settings['tile_size']} px in batches of {settings['batch_size']}, slide of "
        f"{slide['width']} x {slide['height']} px\n"
        f"{machine_text(report['machine'])}\n"
        "alone: the model on one batch, before and after each round. waits: for tiles, which on a CPU are read in turn "
        "with it.\npeak: this process and those that read tiles."
    )


def _table_row(row: dict) -> tuple[str, ...]:
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    speeds = (f"{row['tiles_per_s']:.2f}", f"{row['alone_per_s']:.2f}", f"{row['share']:.1%}")
    return (f"{row['tiles']}", *speeds, f"{row['wait_share']:.1%}", peak)


def write_synthetic_slide(path: Path, pixels: int) -> tuple[int, int]:
    """Write a square, tiled pyramid of tissue without glass, as quick to write as it is large.

    Its TIFF tiles are some few, compressed once, in changing order: reading them costs what reading any costs.

    Args:
        path: the file.
        pixels: of level 0, at least.

    Returns:
        Its width and height, px.

    Raises:
        ImportError: tifffile is missing.
    """
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(f'this benchmark needs tifffile ({error}): pip install "ssmamba-models[wsi]"') from error
    kinds = [zlib.compress(tile.tobytes(), 1) for tile in _tissue_tiles()]
    side = math.ceil(math.sqrt(pixels))
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level in range(6):
            size = max(side >> (2 * level), 1)
            count = math.ceil(size / _SIDE) ** 2
            writer.write(
                (kinds[number * 7 % _KINDS] for number in range(count)),
                shape=(size, size, 3),
                dtype=np.uint8,
                tile=(_SIDE, _SIDE),
                photometric="rgb",
                compression="deflate",
                subfiletype=int(level > 0),
                metadata=None,
                resolution=(10_000 / _MPP, 10_000 / _MPP),
                resolutionunit="CENTIMETER",
            )
            if size <= _SIDE:
                break
    return side, side


def _tissue_tiles() -> Iterator[np.ndarray]:
    dice = np.random.default_rng(0)
    for _ in range(_KINDS):
        coarse = dice.integers(-30, 30, (_SIDE // 8, _SIDE // 8, 3))
        grain = coarse.repeat(8, axis=0).repeat(8, axis=1)
        yield np.clip(np.array([200, 120, 170]) + grain, 0, 255).astype(np.uint8)


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Memory at its most while the block runs, MiB: this process's and its children's own peaks together, each kept by
    the kernel. A child that ends between two looks is missed; where a container forbids to lower this process's mark
    (`lower_high_water_mark`), it holds what came before. The list is filled as time passes, and complete after the
    block; empty where the system does not tell.
    """
    peaks: list[float] = []
    stopped = threading.Event()
    lower_high_water_mark()

    def look() -> None:
        while not stopped.wait(_SAMPLE_SECONDS):
            peak = memory_mib("VmHWM")
            if peak is not None:
                peaks.append(peak)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stopped.set()
        thread.join()
        peak = memory_mib("VmHWM")
        if peak is not None:
            peaks.append(peak)


def memory_mib(kind: str = "VmRSS") -> float | None:
    """Memory of this process and its children, MiB; None where the system does not tell (no /proc).

    Args:
        kind: "VmRSS", what is resident now, or "VmHWM", the most that each had.
    """
    pid = os.getpid()
    own = _resident(pid, kind)
    return None if own is None else (own + sum(_resident(child, kind) or 0 for child in _children(pid))) / _MIB


def _children(pid: int) -> list[int]:
    found, lists = [], list(Path(f"/proc/{pid}/task").glob("*/children"))
    for path in lists:
        with contextlib.suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found if lists else _children_among_all(pid)


def _children_among_all(pid: int) -> list[int]:
    """As `_children`, of kernels without such lists."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def _resident(pid: int, kind: str) -> int | None:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
