"""What SGCL costs besides the encoder, by the number of tiles: on random vectors, and worked out for a million."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from ssmamba_models.benchmark.machine import describe_machine, machine_text, require_device
from ssmamba_models.benchmark.memory import MIB, growth_mib
from ssmamba_models.benchmark.report import format_table, optional_number
from ssmamba_models.benchmark.timing import Call, time_interleaved
from ssmamba_models.ssl.feature_bank import FeatureBank
from ssmamba_models.ssl.hard_negatives import BetaHardNegativeSampler
from ssmamba_models.ssl.nearest_rows import nearest_rows
from ssmamba_models.ssl.propagation import SpatialPropagationMiner
from ssmamba_models.ssl.spatial_neighbors import SpatialNeighborIndex
from ssmamba_models.threads import use_threads

MILLION = 1_000_000
DIM = 128
# Tiles of one synthetic slide.
_SIDE = 100
# What is done how often: once, each epoch, each step.
PIECES = {
    "neighbour index": "once",
    "k-means": "epoch",
    "neighbours": "step",
    "nearest entries": "step",
    "hard negatives": "step",
    "bank update": "step",
}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class SgclBenchmark:
    """What to measure.

    Attributes:
        vectors: N, tiles, each a random unit vector of length 128 (bank) and one of `embed_dim` (encoder features).
        embed_dim: width of the encoder features.
        batch_size: tiles per step; two queries of each go to the nearest entries.
        kmeans: "sklearn" or "faiss".
        memory: measure the peak memory of each piece; on a CPU in a process of its own.
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        rounds: samples of each.
        threads: CPU threads inside an operator; None for the cores that this process may use.
        budget_s: seconds after which no further round begins.
    """

    vectors: int = 100_000
    embed_dim: int = 384
    batch_size: int = 128
    kmeans: str = "sklearn"
    memory: bool = True
    device: str | None = None
    rounds: int = 3
    threads: int | None = None
    budget_s: float = 300.0


def run_sgcl(plan: SgclBenchmark, progress: Progress = lambda line: None) -> dict:
    """Measure each piece over N tiles and over N / 4, and draw the line through both to a million.

    Returns:
        {"benchmark", "machine", "settings", "results": [a row per piece], "held_mib"}, ready for JSON. A row holds
        piece, per ("once", "epoch" or "step"), seconds, quarter_seconds (for N / 4), million_seconds, peak_mib and
        million_mib (None where not measured), and the samples. k-means is one clustering; an epoch has three. held_mib
        has the banks of N tiles and of a million.

    Raises:
        ValueError: a number out of range, a device that is not here.
        ImportError: the package for k-means is missing.
    """
    plan = replace(plan, device=plan.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    require_device(plan.device)
    for name, least in (("vectors", 100), ("embed_dim", 1), ("batch_size", 1), ("rounds", 1)):
        if getattr(plan, name) < least:
            raise ValueError(f"{name.replace('_', ' ')} must be at least {least}, got {getattr(plan, name)}")
    quarter = replace(plan, vectors=plan.vectors // 4)
    with use_threads(plan.threads) as threads:
        machine = describe_machine(plan.device)
        timings = {}
        for part in (quarter, plan):
            progress(f"timing {part.vectors:,} tiles")
            timings[part.vectors] = _time(part)
        peaks, quarter_peaks = (_memory(part, progress) for part in (plan, quarter))
        rows = [_row(plan, piece, timings, peaks[piece], quarter_peaks[piece]) for piece in PIECES]
    return {
        "benchmark": "sgcl",
        "machine": machine,
        "settings": {**asdict(plan), "threads": threads, "dim": DIM},
        "results": rows,
        "held_mib": {"measured": _held(plan.vectors, plan), "million": _held(MILLION, plan)},
    }


def _time(plan: SgclBenchmark) -> dict[str, list[float]]:
    """Seconds of each call, per piece; those of once and of an epoch are slow, and each is timed alone."""
    pieces = _pieces(plan)
    steps = {name: call for name, call in pieces.items() if PIECES[name] == "step"}
    timed = time_interleaved(steps, device=plan.device, rounds=plan.rounds, budget_s=plan.budget_s / 2)
    seconds = {name: [sample / 1e3 for sample in timing.samples_ms] for name, timing in timed.items()}
    deadline = time.monotonic() + plan.budget_s / 2
    for name in pieces.keys() - steps.keys():
        seconds[name] = []
        while not seconds[name] or (len(seconds[name]) < plan.rounds and time.monotonic() < deadline):
            start = time.perf_counter()
            pieces[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _pieces(plan: SgclBenchmark) -> Mapping[str, Call]:
    """Each piece as a call without arguments, on tiles that lie in slides of 100 x 100."""
    device, generator = torch.device(plan.device), torch.Generator().manual_seed(0)
    count = np.arange(plan.vectors)
    manifest = SimpleNamespace(
        slides=(count // _SIDE**2).astype(str), x=count % _SIDE, y=count // _SIDE % _SIDE
    )
    tiles = torch.randperm(plan.vectors, generator=generator)[: plan.batch_size].to(device)
    neighbors = SpatialNeighborIndex(manifest).to(device)
    bank = FeatureBank(plan.vectors, DIM).to(device)
    features = FeatureBank(plan.vectors, plan.embed_dim, seed=1).to(device)
    miner = SpatialPropagationMiner(plan.vectors, n_clusterings=1, kmeans=plan.kmeans).to(device)
    sampler = BetaHardNegativeSampler(plan.vectors)
    queries = F.normalize(torch.randn(2 * len(tiles), DIM, generator=generator), dim=1).to(device)
    encoded = F.normalize(torch.randn(len(tiles), plan.embed_dim, generator=generator), dim=1).to(device)
    every = torch.ones_like(tiles[:, None], dtype=torch.bool)
    return {
        "neighbour index": lambda: SpatialNeighborIndex(manifest).to(device),
        "k-means": lambda: miner.fit(bank.rows, 0),
        "neighbours": lambda: neighbors.query(tiles),
        "nearest entries": lambda: nearest_rows(queries, bank.rows, miner.nearest),
        "hard negatives": lambda: sampler.sample(
            encoded, features.rows, tiles[:, None], every, np.random.default_rng(0)
        ),
        "bank update": lambda: bank.update(tiles, queries[: len(tiles)]),
    }


def _memory(plan: SgclBenchmark, progress: Progress) -> dict[str, float | None]:
    """MiB of each piece on top of what is held."""
    if not plan.memory:
        return dict.fromkeys(PIECES)
    progress(f"memory of {plan.vectors:,} tiles")
    if torch.device(plan.device).type == "cuda":
        return {name: _peak_on_cuda(plan, call) for name, call in _pieces(plan).items()}
    # A process of its own, whose allocator gives back at once what it maps: peaks then are those of the calls.
    command = [sys.executable, "-m", "ssmamba_models.benchmark.sgcl", json.dumps(asdict(plan))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"]
        raise RuntimeError(f"memory of {plan.vectors} tiles: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak_on_cuda(plan: SgclBenchmark, call: Call) -> float:
    torch.cuda.synchronize(plan.device)
    before = torch.cuda.memory_allocated(plan.device)
    torch.cuda.reset_peak_memory_stats(plan.device)
    call()
    torch.cuda.synchronize(plan.device)
    return (torch.cuda.max_memory_allocated(plan.device) - before) / MIB


def _peaks_on_cpu(plan: SgclBenchmark) -> dict[str, float]:
    with use_threads(plan.threads):
        # Once on few tiles: what libraries load at their first use is no memory of the piece.
        for call in _pieces(replace(plan, vectors=100)).values():
            call()
        return {name: growth_mib(call) for name, call in _pieces(plan).items()}


def _row(
    plan: SgclBenchmark,
    piece: str,
    timings: Mapping[int, Mapping[str, list[float]]],
    peak: float | None,
    quarter_peak: float | None,
) -> dict:
    samples, quarter = timings[plan.vectors][piece], timings[plan.vectors // 4][piece]
    seconds, quarter_seconds = float(np.median(samples)), float(np.median(quarter))
    return {
        "piece": piece,
        "per": PIECES[piece],
        "seconds": seconds,
        "quarter_seconds": quarter_seconds,
        "million_seconds": _for_a_million(plan.vectors, seconds, quarter_seconds),
        "peak_mib": peak,
        "million_mib": None if peak is None else _for_a_million(plan.vectors, peak, quarter_peak),
        "samples_s": samples,
        "quarter_samples_s": quarter,
    }


def _for_a_million(vectors: int, whole: float, quarter: float) -> float:
    """The line through (N / 4, quarter) and (N, whole) at a million; it does not fall, whatever noise says."""
    slope = max(0.0, whole - quarter) / (vectors - vectors // 4)
    return whole + slope * (MILLION - vectors)


def _held(vectors: int, plan: SgclBenchmark) -> float:
    """MiB of the banks: V, four corners, and encoder features."""
    return vectors * 4 * (5 * DIM + plan.embed_dim) / MIB


def format_sgcl(report: dict) -> str:
    """The report of `run_sgcl` as a table for a person."""
    settings, held = report["settings"], report["held_mib"]
    headers = ("piece", "per", "ms", "MiB", "ms, 1 M tiles", "MiB, 1 M tiles")
    rows = [
        (
            row["piece"],
            row["per"],
            _digits(row["seconds"] * 1e3),
            optional_number(row["peak_mib"], ".0f"),
            _digits(row["million_seconds"] * 1e3),
            optional_number(row["million_mib"], ".0f"),
        )
        for row in report["results"]
    ]
    return (
        f"{format_table(headers, rows, left=2)}\n\n"
        f"banks: {held['measured']:.0f} MiB, of a million tiles {held['million']:.0f} MiB\n"
        f"{settings['vectors']:,} tiles, {settings['dim']}-d, features {settings['embed_dim']}-d, batches of "
        f"{settings['batch_size']}, k-means of {settings['kmeans']}\n"
        f"{machine_text(report['machine'])}\n"
        "MiB: on top of the banks, at the peak. An epoch has three k-means. 1 M: on the line through N and N / 4;\n"
        "memory of what goes in chunks (nearest entries, hard negatives) levels off below it."
    )


def _digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-9))))}f}"


if __name__ == "__main__":
    print(json.dumps(_peaks_on_cpu(SgclBenchmark(**json.loads(sys.argv[1])))))
