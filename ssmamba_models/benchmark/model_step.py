"""One unit of a model's work, ready to be called: a batch through the encoder, or a step of its training."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import shutil
import tempfile
import time
from dataclasses import dataclass

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssmamba_models.benchmark.train_step import SupervisedLoss, TrainStep

DTYPES = ("float32", "bfloat16")
MODES = ("eager", "optimized", "compiled")
TRAIN_CLASSES = 10  # a training step needs a head; so small a one takes no time


@dataclass(frozen=True)
class StepSpec:
    """What to run. Plain values only, so that it can be sent to another process as JSON.

    Attributes:
        name: a model known to timm.
        size: height and width of the images, in pixels.
        batch_size: images in the batch.
        device: "cpu" or "cuda".
        dtype: "float32", or "bfloat16": autocast over float32 weights, unless the mode is "optimized".
        train: a supervised training step (`TrainStep`); otherwise pooled features in inference mode.
        channels_last: lay images and convolution weights out as NHWC.
        mode: "eager"; "optimized": `ssmamba_models.optimize(model, dtype)`, as the commands run it, inference only;
            "compiled": torch.compile with inductor, in inference with frozen weights.
        threads: CPU threads inside an operator, where another process must be told; None for torch's own.
    """

    name: str
    size: int
    batch_size: int
    device: str = "cpu"
    dtype: str = "float32"
    train: bool = False
    channels_last: bool = False
    mode: str = "eager"
    threads: int | None = None

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


class ModelStep:
    """A model with random weights and a batch of noise; calling it does the work once.

    Attributes:
        model: the eager model.
        build_s: seconds that `optimize`, or torch.compile with its first batch, took; None where eager.

    Raises:
        Whatever timm, the model or the compiler raises for what it cannot take.
    """

    def __init__(self, spec: StepSpec) -> None:
        torch.manual_seed(0)
        self.spec = spec
        layout = torch.channels_last if spec.channels_last else torch.contiguous_format
        self.model = create_encoder(spec).to(memory_format=layout).train(spec.train)
        shape = (spec.batch_size, 3, spec.size, spec.size)
        self.images = torch.randn(shape, device=spec.device).contiguous(memory_format=layout)
        self.labels = torch.arange(spec.batch_size, device=spec.device) % TRAIN_CLASSES
        self.build_s: float | None = None
        start = time.perf_counter()
        self._run: nn.Module = self._build()
        if spec.train:
            self._train_step = TrainStep(SupervisedLoss(self._run), spec.device, spec.dtype, spec.channels_last)
        if spec.mode == "compiled":
            self._compile()
        if spec.mode != "eager":
            self.build_s = time.perf_counter() - start

    def __call__(self) -> None:
        if self.spec.train:
            self._train_step((self.images, self.labels))
        else:
            self.features()

    @torch.inference_mode()
    def features(self) -> torch.Tensor:
        """(B, D), of the batch."""
        autocast = self.spec.dtype == "bfloat16" and self.spec.mode != "optimized"
        with torch.autocast(torch.device(self.spec.device).type, torch.bfloat16, enabled=autocast):
            return self._run(self.images)

    def _build(self) -> nn.Module:
        if self.spec.mode == "optimized":
            from ssmamba_models.inference import optimize

            return optimize(self.model, precision=self.spec.dtype)
        if self.spec.mode == "compiled":
            # Of one shape: told by an earlier model that sizes change, torch would compile slower code for any size.
            return torch.compile(self.model, dynamic=False)
        return self.model

    def _compile(self) -> None:
        # Tracing must see the setting too, so `torch.compile(options=...)` would not do.
        from torch._inductor import config

        os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cold_cache()
        with config.patch(freezing=not self.spec.train):
            self()


@functools.cache
def _cold_cache() -> str:
    """An empty folder for what this process compiles: with that of earlier runs the time to compile would be untrue."""
    folder = tempfile.mkdtemp(prefix="ssmamba-benchmark-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def create_encoder(spec: StepSpec) -> nn.Module:
    """The model at the image size of `spec`, told its size where timm says that it depends on one."""
    config = timm.get_pretrained_cfg(spec.name)
    sized = {"img_size": spec.size} if config is not None and config.fixed_input_size else {}
    classes = TRAIN_CLASSES if spec.train else 0
    return timm.create_model(spec.name, num_classes=classes, **sized).to(spec.device)


@functools.cache
def count_work(name: str, size: int, train: bool) -> tuple[float, float]:
    """Millions of parameters, and billions of multiply-adds of one image as torch's FLOP counter sees them."""
    model = create_encoder(StepSpec(name, size, 1, train=train)).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    # Two FLOPs to a multiply-add.
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9
