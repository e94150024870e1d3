"""Training steps: supervised against peers, MAMIM against a masked autoencoder; and what a training waits for data."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssmamba_models.benchmark.allocators import in_turn
from ssmamba_models.benchmark.defaults import (
    ALLOCATORS,
    DEFAULT_MODEL,
    DEFAULT_PEER,
    DEFAULT_PEERS,
    DTYPE_CHOICES,
    METHODS,
)
from ssmamba_models.benchmark.machine import describe_machine, machine_text, require_device
from ssmamba_models.benchmark.mae import MaskedAutoencoder
from ssmamba_models.benchmark.model_step import DTYPES
from ssmamba_models.benchmark.models import ModelsPlan, require_known, require_model, run_models
from ssmamba_models.benchmark.models_table import spread
from ssmamba_models.benchmark.report import format_table, optional_number
from ssmamba_models.benchmark.timing import Timing, speedup, time_interleaved
from ssmamba_models.benchmark.train_step import TrainStep
from ssmamba_models.data.labelled import LabelledTiles, read_tiles
from ssmamba_models.data.seeded import SeededTiles, collate_seeded
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.engine.loop import to_device
from ssmamba_models.engine.processes import default_workers
from ssmamba_models.ssl.mamim import MAMIM
from ssmamba_models.ssl.mamim_views import MamimViews
from ssmamba_models.threads import use_threads

BATCH_SIZE = {"cpu": 8, "cuda": 128}
PREFETCH = 2  # batches that a worker keeps ready
SYNTHETIC_TILES_PER_KIND = 16

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TrainPlan:
    """What to measure.

    Attributes:
        model: an ssmamba model; trained by MAMIM it computes two views per tile.
        peer: a ViT of timm, trained as a masked autoencoder (75 % dropped, decoder of 8 blocks, 512 wide): one view.
        peers: models of timm whose supervised step is compared with ours.
        method: "supervised", "mamim" (against the masked autoencoder, and the wait for data), or "both".
        size: side of the images and views in pixels.
        batch_size: tiles per step; None chooses by method and device.
        data: folder of tiles for the wait; None draws synthetic ones.
        workers: processes that decode and crop ahead; None chooses by the device.
        wait_steps: MAMIM steps over which the wait is measured, after the first batches.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16" for autocast, or "both"; the wait is measured in the last.
        allocator: "system" leaves malloc as this process has it, "kept" keeps large blocks, "both" does one after the
            other (see `benchmark.models.ModelsPlan`).
        rounds: samples per contender.
        threads: CPU threads inside an operator; None for the cores that this process may use.
        budget_s: seconds per comparison after which no further round begins.
    """

    model: str = DEFAULT_MODEL
    peer: str = DEFAULT_PEER
    peers: Sequence[str] = DEFAULT_PEERS
    method: str = "both"
    size: int = 224
    batch_size: int | None = None
    data: str | None = None
    workers: int | None = None
    wait_steps: int = 10
    device: str = "cpu"
    dtype: str = "float32"
    allocator: str = "system"
    rounds: int = 7
    threads: int | None = None
    budget_s: float = 120.0

    @property
    def batch(self) -> int:
        """Tiles per step of MAMIM."""
        return BATCH_SIZE[torch.device(self.device).type] if self.batch_size is None else self.batch_size

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those to compute in."""
        return DTYPES if self.dtype == "both" else (self.dtype,)


class _MamimLoss(nn.Module):
    def __init__(self, plan: TrainPlan) -> None:
        super().__init__()
        self.method = MAMIM(timm.create_model(plan.model))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.method(batch)["loss"]


class _MaeLoss(nn.Module):
    def __init__(self, plan: TrainPlan) -> None:
        super().__init__()
        self.method = MaskedAutoencoder(plan.peer, plan.size)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.method(batch["low"])


def run_train(plan: TrainPlan, progress: Progress = lambda line: None) -> dict:
    """Measure the training steps that `plan` asks for, contenders in turn, then a MAMIM training that reads its data.

    Returns:
        {"benchmark", "machine", "settings", "results": [row, ...], "data": {...}}, ready for JSON. A row holds model,
        method ("supervised", "mamim", "mae"), views (per tile), dtype, allocator, size, batch_size, parameters_m
        (trained), reason (why there is no more), images_per_s (tiles), ours_over_peer, and the samples. data holds
        source, tiles, workers, dtype, steps, images_per_s, wait_share (of the time, for data), wait_s and step_s; it is
        None without MAMIM.

    Raises:
        ValueError: a model that is unknown or of the wrong kind, a number out of range, a device that is not here.
        OSError: the folder of tiles cannot be read.
    """
    _check(plan)
    with use_threads(plan.threads) as threads, _mamim(plan, progress) as mamim:
        machine = describe_machine(plan.device)
        rows = []
        for allocator in in_turn(plan.allocator):
            for dtype in plan.dtypes:
                if plan.method != "mamim":
                    rows += _supervised_rows(plan, dtype, progress)
                if mamim is not None:
                    rows += mamim.rows(dtype, allocator)
        data = None if mamim is None else mamim.wait(plan.dtypes[-1])
    settings = {**asdict(plan), "peers": list(plan.peers), "threads": threads}
    return {"benchmark": "train", "machine": machine, "settings": settings, "results": rows, "data": data}


def format_train(report: dict) -> str:
    """The report of `run_train` as a table for a person."""
    headers = ("model", "method", "dtype", "malloc", "views", "batch", "M par", "img/s", "+-%", "ours/it")
    rows, data, settings = report["results"], report["data"], report["settings"]
    notes = [f"training steps at {settings['size']} px", machine_text(report["machine"], [r["dtype"] for r in rows])]
    if data is not None:
        notes[:0] = [
            f"waits for data {data['wait_share']:.1%} of the time: {data['images_per_s']:.2f} img/s with "
            f"{data['workers']} worker processes over {data['steps']} steps of MAMIM, {data['dtype']}",
            f"data: {data['source']}",
        ]
    notes += [
        "img/s: tiles; MAMIM computes two views of each. M par: trained parameters, the decoder's included.",
        f"ours/it: throughput of {settings['model']} by the same kind of training over that model's; MAE is MAMIM's.",
        "+-%: half the quartiles' distance.",
    ]
    return "\n".join([format_table(headers, [_table_row(row) for row in rows], left=4), "", *notes])


def _check(plan: TrainPlan) -> None:
    require_device(plan.device)
    for name in (plan.model, plan.peer):
        require_model(name)
    counts = {"size": plan.size, "batch size": plan.batch, "rounds": plan.rounds, "wait steps": plan.wait_steps}
    for what, value in counts.items():
        if value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    if plan.workers is not None and plan.workers < 0:
        raise ValueError(f"workers must be at least 0, got {plan.workers}")
    for what, known in (("method", METHODS), ("dtype", DTYPE_CHOICES), ("allocator", ALLOCATORS)):
        require_known(what, getattr(plan, what), known)


def _supervised_rows(plan: TrainPlan, dtype: str, progress: Progress) -> list[dict]:
    models = ModelsPlan(
        model=plan.model,
        peers=plan.peers,
        sizes=(plan.size,),
        batch_size=plan.batch_size,
        device=plan.device,
        dtype=dtype,
        train=True,
        memory=False,
        rounds=plan.rounds,
        budget_s=plan.budget_s,
    )
    return [{"method": "supervised", "views": 1, **row} for row in run_models(models, progress)["results"]]


class _Mamim:
    """The steps of MAMIM and of the masked autoencoder over the same tiles.

    Raises:
        ValueError: a model of the wrong kind, or no readable tile.
    """

    def __init__(self, plan: TrainPlan, tiles: LabelledTiles, progress: Progress) -> None:
        torch.manual_seed(0)
        self.plan, self.tiles, self.progress = plan, tiles, progress
        self.batch = _first_batch(plan, tiles)
        self.losses: dict[str, nn.Module] = {"mamim": _MamimLoss(plan), "mae": _MaeLoss(plan)}

    def rows(self, dtype: str, allocator: str) -> list[dict]:
        plan = self.plan
        names = f"{plan.model} (MAMIM) and {plan.peer} (MAE)"
        self.progress(f"{plan.size} px, {dtype}, {allocator} malloc: timing {names}, {plan.batch} tiles")
        steps = {name: TrainStep(loss, plan.device, dtype) for name, loss in self.losses.items()}
        timings = time_interleaved(
            {name: (lambda step=step: step(self.batch)) for name, step in steps.items()},
            device=plan.device,
            rounds=plan.rounds,
            budget_s=plan.budget_s,
        )
        common = {"dtype": dtype, "allocator": allocator, "size": plan.size, "batch_size": plan.batch, "reason": None}
        ratio = speedup(timings["mamim"], timings["mae"])
        ours = {"model": plan.model, "method": "mamim", "views": 2, "ours_over_peer": None}
        peer = {"model": plan.peer, "method": "mae", "views": 1, "ours_over_peer": ratio}
        return [
            {**ours, **common, **self._measured(steps["mamim"], timings["mamim"])},
            {**peer, **common, **self._measured(steps["mae"], timings["mae"])},
        ]

    def _measured(self, step: TrainStep, timing: Timing) -> dict[str, Any]:
        images_per_s = self.plan.batch / timing.median_ms * 1e3
        return {"parameters_m": step.parameters_m, "images_per_s": images_per_s, **timing.as_dict()}

    def wait(self, dtype: str) -> dict[str, Any]:
        """What a MAMIM training in `dtype` waits for its data."""
        plan = self.plan
        loader = _loader(plan, self.tiles)
        self.progress(f"{plan.model}: {len(loader)} steps with data from {plan.data or 'synthetic tiles'}")
        source = {"source": plan.data or "synthetic", "tiles": len(self.tiles), "workers": loader.num_workers}
        waited = _measure_wait(plan, TrainStep(self.losses["mamim"], plan.device, dtype), loader)
        return {**source, "dtype": dtype, **waited}


@contextlib.contextmanager
def _mamim(plan: TrainPlan, progress: Progress) -> Iterator[_Mamim | None]:
    if plan.method == "supervised":
        yield None
        return
    with _tiles(plan, progress) as tiles:
        yield _Mamim(plan, tiles, progress)


@contextlib.contextmanager
def _tiles(plan: TrainPlan, progress: Progress) -> Iterator[LabelledTiles]:
    if plan.data is not None:
        yield read_tiles(plan.data)
        return
    with tempfile.TemporaryDirectory() as scratch:
        progress("drawing synthetic tiles")
        yield read_tiles(write_synthetic_tiles(Path(scratch), SYNTHETIC_TILES_PER_KIND, size=max(16, plan.size)))


def _dataset(plan: TrainPlan, tiles: LabelledTiles) -> SeededTiles:
    return SeededTiles(tiles, MamimViews(plan.size), seed=0)


def _loader(plan: TrainPlan, tiles: LabelledTiles) -> DataLoader:
    """Batches for the first steps, which empty what workers had ready before, and for those that count."""
    workers = default_workers(torch.device(plan.device), processes=1) if plan.workers is None else plan.workers
    steps = max(1, PREFETCH * workers) + plan.wait_steps
    numbers = [range(step * plan.batch, (step + 1) * plan.batch) for step in range(steps)]
    return DataLoader(
        _dataset(plan, tiles),
        # (epoch, tile): the tiles come again where there are fewer than the steps need, in other views.
        batch_sampler=[[divmod(number, len(tiles)) for number in batch] for batch in numbers],
        collate_fn=collate_seeded,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.device(plan.device).type == "cuda",
    )


def _first_batch(plan: TrainPlan, tiles: LabelledTiles) -> dict[str, Tensor]:
    dataset = _dataset(plan, tiles)
    batch = collate_seeded([dataset[divmod(number, len(tiles))] for number in range(plan.batch)])
    if batch.views is None:
        raise ValueError(f"none of the {len(tiles)} tiles in {str(tiles.root)!r} is readable")
    return to_device(batch.views, torch.device(plan.device))


def _measure_wait(plan: TrainPlan, step: TrainStep, loader: DataLoader) -> dict:
    """Time spent in getting the next batch, and in all, over the last `wait_steps` of the loader's steps."""
    batches, waits, totals = iter(loader), [], []
    for _ in range(len(loader)):
        start = time.perf_counter()
        views = next(batches).views
        ready = time.perf_counter()
        step(to_device(views, step.device))
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)
        waits.append(ready - start)
        totals.append(time.perf_counter() - start)
    waits, totals = waits[-plan.wait_steps :], totals[-plan.wait_steps :]
    return {
        "steps": plan.wait_steps,
        "images_per_s": plan.wait_steps * plan.batch / sum(totals),
        "wait_share": sum(waits) / sum(totals),
        "wait_s": waits,
        "step_s": totals,
    }


def _table_row(row: dict) -> tuple[str, ...]:
    start = (row["model"], row["method"], row["dtype"], row["allocator"], str(row["views"]), str(row["batch_size"]))
    if row["reason"] is not None:
        return (*start, f"not measured: {row['reason']}")
    return (
        *start,
        f"{row['parameters_m']:.2f}",
        f"{row['images_per_s']:.2f}",
        spread(row),
        optional_number(row["ours_over_peer"], ".2f"),
    )
