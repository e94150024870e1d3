"""A step of MAMIM against a step of a masked autoencoder, and what a training waits for its data."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssmamba_models.benchmark.defaults import DEFAULT_MODEL, DEFAULT_PEER
from ssmamba_models.benchmark.machine import describe_machine, machine_line, require_device
from ssmamba_models.benchmark.mae import MaskedAutoencoder
from ssmamba_models.benchmark.model_step import DTYPES
from ssmamba_models.benchmark.models import require_model
from ssmamba_models.benchmark.report import format_table, optional_number
from ssmamba_models.benchmark.timing import Timing, speedup, time_interleaved
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
        model: an ssmamba model, trained by MAMIM: two views per tile.
        peer: a ViT of timm, trained as a masked autoencoder (75 % dropped, decoder of 8 blocks, 512 wide): one view.
        size: side of the views in pixels.
        batch_size: tiles per step; None chooses by the device.
        data: folder of tiles for the wait; None draws synthetic ones.
        workers: processes that decode and crop ahead; None chooses by the device.
        wait_steps: training steps over which the wait is measured, after the first batches.
        device: "cpu" or "cuda".
        dtype: "float32", or "bfloat16" for autocast.
        rounds: samples per contender.
        threads: CPU threads inside an operator; None for the cores that this process may use.
        budget_s: seconds after which no further round begins.
    """

    model: str = DEFAULT_MODEL
    peer: str = DEFAULT_PEER
    size: int = 224
    batch_size: int | None = None
    data: str | None = None
    workers: int | None = None
    wait_steps: int = 10
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 7
    threads: int | None = None
    budget_s: float = 120.0

    @property
    def batch(self) -> int:
        """Tiles per step."""
        return BATCH_SIZE[torch.device(self.device).type] if self.batch_size is None else self.batch_size


class TrainStep:
    """Forward, backward and AdamW step of a module that returns its loss.

    Args:
        module: called with a batch as `MamimViews` makes it, on its device.
        plan: names the device and the dtype.
    """

    def __init__(self, module: nn.Module, plan: TrainPlan) -> None:
        # As the training loop does; the ViT has one convolution, to which it is the same.
        self.module = module.to(plan.device, memory_format=torch.channels_last).train()
        self.device, self.dtype = torch.device(plan.device), DTYPES[plan.dtype]
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.parameters_m = sum(parameter.numel() for parameter in trained) / 1e6
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def __call__(self, batch: dict[str, Tensor]) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            loss = self.module(batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


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
    """Measure the steps of both contenders on one batch, in turn, then a MAMIM training that reads its data.

    Returns:
        {"benchmark", "machine", "settings", "results": [row, row], "data": {...}}, ready for JSON. A row holds model,
        method, views (per tile), parameters_m (trained), images_per_s (tiles), ours_over_peer, and the samples; data
        holds source, tiles, workers, steps, images_per_s, wait_share (of the time, for data), wait_s and step_s.

    Raises:
        ValueError: a model that is unknown or of the wrong kind, a number out of range, a device that is not here.
        OSError: the folder of tiles cannot be read.
    """
    _check(plan)
    with use_threads(plan.threads) as threads, _tiles(plan, progress) as tiles:
        machine = describe_machine(plan.device)
        torch.manual_seed(0)
        loader = _loader(plan, tiles)
        steps = {"mamim": TrainStep(_MamimLoss(plan), plan), "mae": TrainStep(_MaeLoss(plan), plan)}
        progress(f"timing {plan.model} (MAMIM) and {plan.peer} (MAE), {plan.batch} tiles of {plan.size} px")
        rows = _time_steps(plan, steps, _first_batch(plan, tiles))
        progress(f"{plan.model}: {len(loader)} steps with data from {plan.data or 'synthetic tiles'}")
        waited = _measure_wait(plan, steps["mamim"], loader)
    return {
        "benchmark": "train",
        "machine": machine,
        "settings": {**asdict(plan), "batch_size": plan.batch, "workers": loader.num_workers, "threads": threads},
        "results": rows,
        "data": {"source": plan.data or "synthetic", "tiles": len(tiles), "workers": loader.num_workers, **waited},
    }


def format_train(report: dict) -> str:
    """The report of `run_train` as a table for a person."""
    headers = ("model", "method", "views", "M par", "img/s", "+-%", "ours/it")
    rows = [_table_row(row) for row in report["results"]]
    settings, data = report["settings"], report["data"]
    return (
        f"{format_table(headers, rows, left=2)}\n\n"
        f"waits for data {data['wait_share']:.1%} of the time: {data['images_per_s']:.2f} img/s with "
        f"{data['workers']} worker processes over {data['steps']} steps\n"
        f"data: {data['source']}\n"
        f"steps of {settings['batch_size']} tiles at {settings['size']} px, {settings['dtype']}\n"
        f"{machine_line(report['machine'])}\n"
        "img/s: tiles; MAMIM computes two views of each. M par: trained parameters, the decoder's included.\n"
        f"ours/it: throughput of {settings['model']} over that model's. +-%: half the quartiles' distance."
    )


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
    if plan.dtype not in DTYPES:
        raise ValueError(f"dtype {plan.dtype!r} is unknown; expected one of {', '.join(DTYPES)}")


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


def _time_steps(plan: TrainPlan, steps: dict[str, TrainStep], batch: dict[str, Tensor]) -> list[dict]:
    timings = time_interleaved(
        {name: (lambda step=step: step(batch)) for name, step in steps.items()},
        device=plan.device,
        rounds=plan.rounds,
        budget_s=plan.budget_s,
    )
    ratio = speedup(timings["mamim"], timings["mae"])
    return [
        _as_row(plan, plan.model, "mamim", 2, steps["mamim"], timings["mamim"], None),
        _as_row(plan, plan.peer, "mae", 1, steps["mae"], timings["mae"], ratio),
    ]


def _as_row(
    plan: TrainPlan, model: str, method: str, views: int, step: TrainStep, timing: Timing, ratio: float | None
) -> dict:
    return {
        "model": model,
        "method": method,
        "views": views,
        "parameters_m": step.parameters_m,
        "images_per_s": plan.batch / timing.median_ms * 1e3,
        "ours_over_peer": ratio,
        **timing.as_dict(),
    }


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
    lower, upper = row["quartiles_ms"]
    return (
        row["model"],
        row["method"],
        str(row["views"]),
        f"{row['parameters_m']:.2f}",
        f"{row['images_per_s']:.2f}",
        f"{(upper - lower) / 2 / row['median_ms'] * 100:.1f}",
        optional_number(row["ours_over_peer"], ".2f"),
    )
