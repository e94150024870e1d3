"""Augmentation for supervised training: timm's, made a function of a generator."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image


class SeededTransform:
    """Any random transform of torchvision or timm, driven by a `torch.Generator`.

    Those transforms draw from the global generators of Python, numpy and torch. Here these are seeded for the call and
    put back after it, so that a view depends on the generator alone, in a worker process and in the training process.

    Args:
        transform: a PIL image -> a tensor.

    Call: (PIL image, torch.Generator) -> what `transform` returns.
    """

    def __init__(self, transform: Callable[[Image.Image], Any]):
        self.transform = transform

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Any:
        with _seeded(int(torch.randint(2**32, (), generator=generator))):
            return self.transform(image)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    python, numbers, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed: it would seed the GPUs as well, whose state is not put back.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(torch_state)
