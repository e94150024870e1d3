"""One unit of a model's work, ready to be called: a batch through the encoder, or a step of its training."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAIN_CLASSES = 10  # a training step needs a head; so small a one takes no time


@dataclass(frozen=True)
class StepSpec:
    """What to run. Plain values only, so that it can be sent to another process as JSON.

    Attributes:
        name: a model known to timm.
        size: height and width of the images, in pixels.
        batch_size: images in the batch.
        device: "cpu" or "cuda".
        dtype: "float32", or "bfloat16" for autocast over float32 weights.
        train: forward, cross-entropy, backward and AdamW step; otherwise pooled features in inference mode.
        channels_last: lay images and convolution weights out as NHWC.
        compiled: run through torch.compile.
        threads: CPU threads inside an operator, where another process must be told; None for torch's own.
    """

    name: str
    size: int
    batch_size: int
    device: str = "cpu"
    dtype: str = "float32"
    train: bool = False
    channels_last: bool = False
    compiled: bool = False
    threads: int | None = None

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


class ModelStep:
    """A model with random weights and a batch of noise; calling it does the work once.

    Raises:
        Whatever timm or the model raises for a size that it cannot take.
    """

    def __init__(self, spec: StepSpec) -> None:
        torch.manual_seed(0)
        self.spec = spec
        self.model = create_encoder(spec)
        layout = torch.channels_last if spec.channels_last else torch.contiguous_format
        self.model.to(memory_format=layout).train(spec.train)
        shape = (spec.batch_size, 3, spec.size, spec.size)
        self.images = torch.randn(shape, device=spec.device).contiguous(memory_format=layout)
        self.labels = torch.arange(spec.batch_size, device=spec.device) % TRAIN_CLASSES
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5) if spec.train else None
        self._run = torch.compile(self.model) if spec.compiled else self.model

    def __call__(self) -> None:
        if self._optimizer is None:
            self._infer()
        else:
            self._train(self._optimizer)

    def _infer(self) -> None:
        with torch.inference_mode(), self._autocast():
            self._run(self.images)

    def _train(self, optimizer: torch.optim.Optimizer) -> None:
        with self._autocast():
            loss = torch.nn.functional.cross_entropy(self._run(self.images), self.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.spec.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.spec.device).type, DTYPES[self.spec.dtype])

    @property
    def parameters_m(self) -> float:
        """Millions of parameters."""
        return sum(p.numel() for p in self.model.parameters()) / 1e6

    def gmacs(self) -> float:
        """Billions of multiply-adds of one image, as torch's FLOP counter sees them (two FLOPs to one)."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.model(self.images[:1])
        return counter.get_total_flops() / 2e9


def create_encoder(spec: StepSpec) -> torch.nn.Module:
    """The model at the image size of `spec`, told its size where timm says that it depends on one."""
    config = timm.get_pretrained_cfg(spec.name)
    sized = {"img_size": spec.size} if config is not None and config.fixed_input_size else {}
    classes = TRAIN_CLASSES if spec.train else 0
    return timm.create_model(spec.name, num_classes=classes, **sized).to(spec.device)
