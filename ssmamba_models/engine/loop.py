"""The training loop: an optimiser over seeded batches, on one process or many, that can stop and go on anywhere."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from ssmamba_models.data.batches import read_batches
from ssmamba_models.data.seeded import GlobalBatches, SeededBatch, SeededData, collate_seeded, mixed_seed
from ssmamba_models.engine.checkpoints import Checkpoints, plain_state, save_run_weights
from ssmamba_models.engine.clock import Clock
from ssmamba_models.engine.config import config_values
from ssmamba_models.engine.device import use_bf16
from ssmamba_models.engine.optimisation import create_optimizer, create_schedule, parameter_groups
from ssmamba_models.engine.processes import StopSignals, default_workers, ignore_stop_signals
from ssmamba_models.engine.rng import restore_rng, rng_state, seed_everything
from ssmamba_models.engine.run_log import RunLog
from ssmamba_models.engine.train_config import LoopConfig
from ssmamba_models.inference import fuse_for_training, unfuse
from ssmamba_models.notice import one_line
from ssmamba_models.ops.dispatch import is_served_by


@dataclass
class Task:
    """What is trained.

    Attributes:
        module: maps a batch of views to a dict of scalars; "loss" is minimised, the others are logged.
        data: the tiles, or whatever else, and their views.
        export: module -> (what is saved of it, metadata); by default a state dict.
        save: writes (run folder, what is saved, metadata); by default RUN/weights.safetensors.
        groups: groups of parameters; None makes them by weight decay.
        step_start: called on every process before each step with (epochs done, steps done).
        epoch_end: called on every process with (epoch counted from 1, module to look at, in eval mode, log); returns
            what to log. FloatingPointError: what it looked at is not finite.
        weights: (N,) chances of each tile to be drawn, with replacement; None visits each tile once an epoch.
        memory: what else a checkpoint holds, by its `state_dict` and `load_state_dict`.
        collate: joins what `data` gives to a batch.
        images: whether (B, C, H, W) in a batch are images, through which convolutions run up to a quarter faster on
            channels-last memory.
    """

    module: nn.Module
    data: SeededData
    export: Callable[[nn.Module], tuple[Any, dict[str, Any]]]
    groups: list[dict[str, Any]] | None = None
    step_start: Callable[[int, int], None] | None = None
    epoch_end: Callable[[int, nn.Module, RunLog], Mapping[str, Any]] | None = None
    weights: torch.Tensor | None = None
    memory: Any = None
    collate: Callable[..., SeededBatch] = collate_seeded
    images: bool = True
    save: Callable[[Path, Any, dict[str, Any]], Any] = save_run_weights


@dataclass
class Progress:
    """Where a training stands; all of it is in every checkpoint.

    Attributes:
        step: steps done.
        seconds: time spent, over all its processes' lives.
        sums: of each logged value over the epoch's steps so far.
        unreadable: path -> reason of the tiles that could not be read.
    """

    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """What a training did.

    Attributes:
        run: the run folder.
        step, steps: steps done, and steps that the whole training has.
        stopped_by: the signal that ended it early, or None.
        unreadable: (path, reason) of the tiles that were replaced.
        last: what was logged of the last epoch that ended.
        noun: what a tile is called where it is something else.
    """

    run: Path
    step: int
    steps: int
    stopped_by: int | None
    unreadable: list[tuple[str, str]]
    last: dict[str, Any]
    noun: str = "tile"


class Trainer:
    """Trains a `Task` in a run folder that is ready (see `ssmamba_models.engine.run_folder`).

    Args:
        config: its hyper-parameters.
        run: the run folder.
        task: what is trained.
        accelerator: of `create_accelerator`.
        progress: draw a progress bar.
    """

    def __init__(self, config: LoopConfig, run: Path, task: Task, accelerator: Any, *, progress: bool = True):
        self.config, self.run, self.task, self.accelerator = config, run, task, accelerator
        self.device = accelerator.device
        self.bf16 = use_bf16(config.precision, self.device)
        self.checkpoints = Checkpoints(run / "checkpoints", config.keep_checkpoints)
        self.state, self.last, self.newest = Progress(), {}, None
        self.batches = global_batches(config, len(task.data), accelerator, task.weights, task.data.noun)
        layout = torch.channels_last if task.images else torch.preserve_format
        self.module = task.module.to(self.device, memory_format=layout)
        fused = self.device.type == "cpu" and fuse_for_training(self.module) > 0
        groups = task.groups or parameter_groups(self.module, config.weight_decay)
        self.optimizer = create_optimizer(config, groups)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.schedule = create_schedule(config, self.optimizer, self.batches.steps_per_epoch)
        self.ema = None if config.ema_decay is None else ModelEmaV3(self.module, config.ema_decay)
        seed_everything(mixed_seed(config.seed, accelerator.process_index))
        self._resume()
        self.wrapped = accelerator.prepare_model(self.module)
        self.log = RunLog(run, self.state.step, self.batches.steps, main=accelerator.is_main_process, progress=progress)
        if fused and not is_served_by("c", "cpu"):
            self.log.tell("trains layer by layer: the fused operators need the C kernels (`ssmamba doctor` tells more)")

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self.state.step // self.batches.steps_per_epoch

    def train(self) -> TrainResult:
        """Train to the end, or until SIGTERM or SIGINT.

        Raises:
            ValueError: the loss is not finite, or no tile is readable.
            OSError: a checkpoint cannot be written, or a process that reads tiles died.
        """
        signals = StopSignals()
        try:
            with signals.caught():
                self._train(signals)
        finally:
            self.log.close()
            unfuse(self.module)
        return TrainResult(
            self.run,
            self.state.step,
            self.batches.steps,
            signals.received if self.state.step < self.batches.steps else None,
            sorted(self.state.unreadable.items()),
            self.last,
            self.task.data.noun,
        )

    def _train(self, signals: StopSignals) -> None:
        if self.state.step == self.batches.steps:
            self._export()
            return
        self.module.train()
        clock = Clock(self.state.seconds, self._seen(), self.task.data.counted)
        batches = self._loaded_batches()
        while self.state.step < self.batches.steps:
            values = self._step(batches, clock, signals)
            stop, due = values.pop("stop") > 0, values.pop("due") > 0
            self._check_finite(values)
            self._record(values, clock)
            ended = self.state.step % self.batches.steps_per_epoch == 0
            if ended:
                self._end_epoch(clock)
            if stop or due or self._checkpoint_due(ended):
                self._save(clock)
            if stop:
                return

    def _step(self, batches: Iterator[SeededBatch], clock: Clock, signals: StopSignals) -> dict[str, float]:
        """One update; returns the global batch's means of what the module gave, and what all processes agree on."""
        sums: dict[str, torch.Tensor] = {}
        if self.task.step_start is not None:
            self.task.step_start(self.epoch, self.state.step)
        for micro in range(self.config.accumulate):
            with clock.waiting():
                batch = next(batches)
            self._note_unreadable(batch)
            views = to_device(batch.views, self.device, self.task.images)
            last = micro == self.config.accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    parts = self.wrapped(views)
                self.accelerator.backward(parts["loss"] / self.config.accumulate)
            for name, value in parts.items():
                share = value.detach().float() / self.config.accumulate
                sums[name] = sums[name] + share if name in sums else share
        limit = math.inf if self.config.clip_grad is None else self.config.clip_grad
        sums["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, limit)
        lr = self._lr()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.schedule.step_update(self.state.step)
        if self.ema is not None:
            self.ema.update(self.module, self.state.step)
        # The processes must stop and save together: one reduction tells them, and carries the values to log.
        sums["stop"] = torch.tensor(float(signals.received is not None), device=self.device)
        sums["due"] = torch.tensor(float(self._minutes_passed(clock)), device=self.device)
        means = torch.stack([value.to(self.device) for value in sums.values()])
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, reduction="mean")
        return {**dict(zip(sums, means.tolist())), "lr": lr}

    def _check_finite(self, values: Mapping[str, float]) -> None:
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise self._diverged(f"loss {values['loss']}, gradient norm {values['grad_norm']}", values["lr"])

    def _diverged(self, what: str, lr: float) -> ValueError:
        good = "there is no checkpoint yet"
        if self.newest:
            good = f"the last good checkpoint is {self.newest}, and --init {self.run} starts from its weights"
        return ValueError(
            f"the training diverged at step {self.state.step}: {what}, learning rate {lr:.3g}; {good}. Cures, in a new "
            "--out: a lower --lr, a longer warm-up (--warmup-epochs), a smaller clip_grad (--set clip_grad=0.3), "
            "--precision fp32"
        )

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _record(self, values: dict[str, float], clock: Clock) -> None:
        sums = self.state.sums
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
        self.log.advance(values["loss"])
        if self.state.step % self.config.log_every == 0 or self.state.step in (1, self.batches.steps):
            self.log.write({**self._place(), **values, **clock.lap(self._seen())})

    def _seen(self) -> int:
        return self.state.step * self.config.batch_size

    def _place(self) -> dict[str, Any]:
        epoch = (self.state.step - 1) // self.batches.steps_per_epoch + 1
        return {"step": self.state.step, "epoch": epoch, self.task.data.counted: self._seen()}

    def _end_epoch(self, clock: Clock) -> None:
        means = {name: value / self.batches.steps_per_epoch for name, value in self.state.sums.items()}
        self.state.sums = {}
        record = {**self._place(), "event": "epoch", **means, "seconds": round(clock.seconds(), 3)}
        if self.task.epoch_end is not None:
            looked_at = self.module if self.ema is None else self.ema.module
            looked_at.eval()
            try:
                with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    record.update(self.task.epoch_end(self.epoch, looked_at, self.log))
            except FloatingPointError as error:
                raise self._diverged(str(error), self._lr()) from error
            self.module.train()
        self.last = record
        self.log.write(record, "epoch")

    # --- data

    def _loaded_batches(self) -> Iterator[SeededBatch]:
        self.batches.start = self.state.step
        config, processes = self.config, self.accelerator.num_processes
        workers = default_workers(self.device, processes) if config.workers is None else config.workers
        # One pass over the loader is the whole training: workers live through it, and read across epochs' borders.
        loader = DataLoader(
            self.task.data,
            batch_sampler=self.batches,
            collate_fn=self.task.collate,
            num_workers=min(workers, len(self.batches)),
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_stop_signals,
            # Its draw must not move the generator that a checkpoint holds.
            generator=torch.Generator(),
        )
        return read_batches(loader, f"reads {self.task.data.noun}s", ", then go on with --resume")

    def _note_unreadable(self, batch: SeededBatch) -> None:
        data = self.task.data
        found = {data.name(index): reason for index, reason in batch.unreadable}
        self._report_unreadable(found, self.state.step + 1)
        if batch.views is None:
            name, reason = data.name(batch.unreadable[0][0]), batch.unreadable[0][1]
            raise ValueError(
                f"none of the {len(data)} {data.noun}s in {data.where!r} is readable (first: {name}: {reason})"
            )

    def _report_unreadable(self, found: Mapping[str, str], step: int) -> None:
        new = {path: reason for path, reason in found.items() if path not in self.state.unreadable}
        self.state.unreadable.update(new)
        for path, reason in new.items():
            self.log.tell(f"unreadable, replaced: {path!r}: {reason}")
            self.log.write({"step": step, "event": "unreadable", "path": path, "reason": reason})

    # --- checkpoints

    def _minutes_passed(self, clock: Clock) -> bool:
        minutes = self.config.checkpoint_minutes
        return minutes is not None and self.accelerator.is_main_process and clock.since_save() >= 60 * minutes

    def _checkpoint_due(self, epoch_ended: bool) -> bool:
        config, step = self.config, self.state.step
        by_steps = config.checkpoint_steps is not None and step % config.checkpoint_steps == 0
        by_epochs = config.checkpoint_epochs is not None and epoch_ended and self.epoch % config.checkpoint_epochs == 0
        return by_steps or by_epochs or step == self.batches.steps

    def _save(self, clock: Clock) -> None:
        generators = self._gather(rng_state(self.device))
        # Only the first process writes: what the others could not read it learns here.
        for found in self._gather(dict(self.state.unreadable)):
            self._report_unreadable(found, self.state.step)
        self.state.seconds = clock.seconds()
        if self.accelerator.is_main_process:
            self.log.sync()
            self.newest = self.checkpoints.save(self.state.step, self._checkpoint(generators))
            self._export()
        self.accelerator.wait_for_everyone()
        clock.saved()

    def _gather(self, value: Any) -> list[Any]:
        if self.accelerator.num_processes == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def _checkpoint(self, generators: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "module": plain_state(self.module),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": None if self.ema is None else plain_state(self.ema.module),
            "step": self.state.step,
            "epoch": self.epoch,
            "step_in_epoch": self.state.step % self.batches.steps_per_epoch,
            "seconds": self.state.seconds,
            "sums": dict(self.state.sums),
            "unreadable": dict(self.state.unreadable),
            "rng": generators,
            "memory": None if self.task.memory is None else self.task.memory.state_dict(),
            "config": config_values(self.config),
            "data": self.task.data.sha256(),
        }

    def _resume(self) -> None:
        state = self.checkpoints.load(self._tell)
        steps = self._gather(0 if state is None else state["step"])
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes find different checkpoints in {str(self.run)!r} (of steps "
                f"{', '.join(map(str, steps))}); put --out in a folder that all machines share"
            )
        if state is not None:
            self._check_data(state)
            self._restore(state)

    def _check_data(self, state: Mapping[str, Any]) -> None:
        data = self.task.data
        if state["data"] != data.sha256():
            raise ValueError(
                f"{data.where!r} does not hold the {data.noun}s that {str(self.run)!r} was begun with (their "
                f"{data.traits} differ); restore them, or begin another run with another --out"
            )

    def _restore(self, state: Mapping[str, Any]) -> None:
        newest = self.checkpoints.folder / f"step-{state['step']:08d}.pt"
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            if self.task.memory is not None:
                self.task.memory.load_state_dict(state["memory"])
        # The settings are the same, as was checked: what differs is the code.
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"the checkpoint {str(newest)!r} was written by another version of this package or of timm "
                f"({one_line(error)[:200]}); go on with that version, or begin another run with another "
                "--out"
            ) from error
        self.state = Progress(state["step"], state["seconds"], state["sums"], state["unreadable"])
        self.newest = newest
        process = self.accelerator.process_index
        if process == 0:
            # A kill between the writing of one and the removal of the oldest leaves one too many.
            self.checkpoints.prune(state["step"])
        # With another number of processes the new ones keep the state that they were seeded with.
        if process < len(state["rng"]):
            restore_rng(state["rng"][process], self.device)

    def _tell(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, file=sys.stderr)

    def _export(self) -> None:
        if self.accelerator.is_main_process:
            module = self.module if self.ema is None else self.ema.module
            saved, metadata = self.task.export(module)
            self.task.save(self.run, saved, {**metadata, "step": str(self.state.step)})


def global_batches(
    config: LoopConfig, count: int, accelerator: Any, weights: torch.Tensor | None = None, noun: str = "tile"
) -> GlobalBatches:
    """This process's share of every batch over `count` tiles (ValueError: too few tiles, or no even shares)."""
    return GlobalBatches(
        count,
        config.batch_size,
        config.epochs,
        config.seed,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        accumulate=config.accumulate,
        weights=weights,
        noun=noun,
    )


def to_device(views: Any, device: torch.device, images: bool = True) -> Any:
    """Move the tensors of a batch to a device, images (B, C, H, W) in channels-last memory."""
    if torch.is_tensor(views):
        image = images and views.ndim == 4 and views.is_floating_point()
        layout = torch.channels_last if image else torch.preserve_format
        return views.to(device, non_blocking=True, memory_format=layout)
    if isinstance(views, Mapping):
        return {name: to_device(value, device, images) for name, value in views.items()}
    if isinstance(views, (list, tuple)):
        return type(views)(to_device(value, device, images) for value in views)
    return views
