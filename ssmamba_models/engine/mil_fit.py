"""One training of an aggregator: slides one at a time, early stopping, the best epoch's weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssmamba_models.data.bags import Bags
from ssmamba_models.data.seeded import epoch_order, mixed_seed
from ssmamba_models.engine.classifier import inverse_frequencies
from ssmamba_models.engine.device import use_bf16
from ssmamba_models.engine.mil_config import MilConfig
from ssmamba_models.engine.mil_data import BagReader
from ssmamba_models.engine.mil_folds import MilFold
from ssmamba_models.engine.optimisation import create_optimizer, create_schedule, parameter_groups
from ssmamba_models.engine.rng import seed_everything
from ssmamba_models.slide.aggregator import Aggregator
from ssmamba_models.slide.aggregators import create_aggregator


@dataclass
class FitResult:
    """What a training gave.

    Attributes:
        model: with the weights of the best epoch, in eval mode.
        best_epoch: counted from 1.
        val_loss: of that epoch.
        history: for each epoch, epoch, train_loss and val_loss.
    """

    model: Aggregator
    best_epoch: int = 0
    val_loss: float = math.inf
    history: list[dict[str, Any]] = field(default_factory=list)


class BagPredictor:
    """Runs an aggregator over whole slides, one at a time, without gradients.

    Args:
        model: the aggregator, on its device.
        reader: reads the slides.
        bf16: compute under bfloat16 autocast.
    """

    def __init__(self, model: nn.Module, reader: BagReader, bf16: bool):
        self.model, self.reader, self.bf16 = model, reader, bf16
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def output(self, place: int) -> dict[str, Any]:
        """What the aggregator says of one slide, a batch of one."""
        self.model.eval()
        features, coords = self.reader.read(place)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(features.to(self.device)[None], coords.to(self.device)[None])

    def finite_output(self, place: int) -> dict[str, Any]:
        """As `output`, for what is told to a user.

        Raises:
            ValueError: the logits are not finite; as probabilities they would stand for the first class.
        """
        output = self.output(place)
        if not output["logits"].isfinite().all():
            raise ValueError(
                f"what the model says of slide {self.reader.bags.bags[place].slide!r} is not finite; look for NaN in "
                "its features with `ssmamba check`"
            )
        return output

    def logits(self, places: np.ndarray) -> Tensor:
        """(n, num_classes) float32, on the CPU; raises as `finite_output`."""
        return torch.cat([self.finite_output(int(place))["logits"].float().cpu() for place in places])


class Fit:
    """Trains an aggregator on one fold; `run` does it all.

    Args:
        config: the hyper-parameters.
        bags: the slides.
        fold: which to learn from and which to stop by.
        number: of the fold; with the config's seed it decides weights, order and tiles.
        reader: reads the slides.
        device: where to compute.
    """

    def __init__(
        self, config: MilConfig, bags: Bags, fold: MilFold, number: int, reader: BagReader, device: torch.device
    ):
        self.config, self.fold, self.reader, self.device = config, fold, reader, device
        self.seed = mixed_seed(config.seed, number)
        self.targets = torch.from_numpy(bags.targets)
        self.bf16 = use_bf16(config.precision, device)
        seed_everything(self.seed)
        model = create_aggregator(config.aggregator, bags.feature_dim, len(bags.classes), **config.aggregator_args).to(
            device
        )
        self.model = model
        self.predictor = BagPredictor(model, reader, self.bf16)
        self.optimizer = create_optimizer(config, parameter_groups(model, config.weight_decay))
        self.steps = -(-len(fold.train) // config.batch_size)
        self.schedule = create_schedule(config, self.optimizer, self.steps)
        frequencies = inverse_frequencies(self.targets[fold.train].tolist(), len(bags.classes))
        self.class_weights = frequencies.to(device) if config.balance == "loss" else None
        self.chances = frequencies[self.targets[fold.train]] if config.balance == "sampler" else None

    def run(self, tell: Callable[[dict[str, Any]], None] = lambda record: None) -> FitResult:
        """Train until the validation loss has not fallen for `patience` epochs.

        Args:
            tell: called after each epoch with what `FitResult.history` keeps of it.

        Raises:
            ValueError: the loss is not finite.
        """
        result, kept = FitResult(self.model), {}
        for epoch in range(self.config.epochs):
            record = {"epoch": epoch + 1, "train_loss": self._epoch(epoch), "val_loss": self._val_loss()}
            result.history.append(record)
            tell(record)
            if record["val_loss"] < result.val_loss:
                result.best_epoch, result.val_loss = epoch + 1, record["val_loss"]
                kept = copy.deepcopy(self.model.state_dict())
            elif epoch + 1 - result.best_epoch >= self.config.patience:
                break
        self.model.load_state_dict(kept)
        self.model.eval()
        return result

    def _epoch(self, epoch: int) -> float:
        self.model.train()
        order = self.fold.train[epoch_order(len(self.fold.train), self.seed, epoch, self.chances).numpy()]
        total = 0.0
        for step in range(self.steps):
            batch = order[step * self.config.batch_size : (step + 1) * self.config.batch_size]
            self.optimizer.zero_grad()
            # One slide at a time: memory is that of the largest, whatever the batch.
            losses = [self._backward(int(place), epoch, len(batch)) for place in batch]
            if self.config.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            self.optimizer.step()
            self.schedule.step_update(epoch * self.steps + step + 1)
            total += sum(losses)
        return total / len(order)

    def _backward(self, place: int, epoch: int, count: int) -> float:
        seed = mixed_seed(self.seed, epoch, place)
        features, coords = self.reader.read(place, self.config.max_tiles, seed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model(features.to(self.device)[None], coords.to(self.device)[None])
            loss = self.model.loss(output, self.targets[place : place + 1].to(self.device), self.class_weights)
        value = self._finite(loss, place)
        (loss / count).backward()
        return value

    def _finite(self, loss: Tensor, place: int) -> float:
        value = loss.item()
        if not math.isfinite(value):
            slide = self.reader.bags.bags[place].slide
            raise ValueError(
                f"the loss of slide {slide!r} is {value}; lower --lr, or look for NaN in its features with "
                "`ssmamba check`"
            )
        return value

    def _val_loss(self) -> float:
        total = 0.0
        for place in self.fold.val:
            output = self.predictor.output(int(place))
            # What the model gave may be bfloat16, and a loss may have layers of its own.
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.model.loss(output, self.targets[place : place + 1].to(self.device), self.class_weights)
            total += self._finite(loss, int(place))
        return total / len(self.fold.val)
