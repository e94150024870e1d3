"""Pictures of what a masked model fills in, of the same few tiles throughout a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from ssmamba_models.data.seeded import SeededTiles, collate_seeded
from ssmamba_models.engine.loop import to_device
from ssmamba_models.engine.run_log import RunLog
from ssmamba_models.output import whole_file


def fixed_batch(data: SeededTiles, count: int = 8) -> object:
    """The views of a few tiles spread over the data, the same at every call."""
    places = torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist()
    return collate_seeded([data[0, index] for index in places]).views


def draw_reconstructions(module: nn.Module, batch: object) -> torch.Tensor:
    """One row per tile: input, masked, predicted.

    Args:
        module: in eval mode, with `reconstruct`.
        batch: of `fixed_batch`.

    Returns:
        (3, height, width) float32 in 0..1, on the CPU.
    """
    reconstruct = cast("Callable[[object], dict[str, torch.Tensor]]", module.reconstruct)
    pictures = reconstruct(to_device(batch, next(module.parameters()).device))
    columns = [pictures[name].float().cpu() for name in ("input", "masked", "predicted")]
    rows = torch.cat([_frame(column) for column in columns], dim=3)
    return torch.cat(list(rows), dim=1)


def save_reconstructions(picture: torch.Tensor, run: Path, epoch: int, log: RunLog, step: int) -> Path:
    """Write the picture to RUN/reconstructions/epoch-0001.png and to TensorBoard."""
    folder = run / "reconstructions"
    folder.mkdir(exist_ok=True)
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    path = folder / f"epoch-{epoch:04d}.png"
    with whole_file(path, overwrite=True) as part:
        Image.fromarray(np.ascontiguousarray(pixels)).save(part)
    log.image("reconstructions", picture, step)
    return path


def _frame(images: torch.Tensor, width: int = 2) -> torch.Tensor:
    return nn.functional.pad(images, (width,) * 4, value=1.0)
