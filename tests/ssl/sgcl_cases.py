"""Small SGCL set-ups for its tests: tiles on grids, batches of noise, a tiny encoder."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import timm
import torch

from ssmamba_models.ssl.sgcl import SGCL


def grid_manifest(slides: int = 2, columns: int = 6, rows: int = 6) -> SimpleNamespace:
    """Full grids of columns x rows tiles."""
    x, y = (axis.reshape(-1) for axis in np.meshgrid(np.arange(columns), np.arange(rows)))
    names = [f"slide{number}" for number in range(slides) for _ in range(len(x))]
    return SimpleNamespace(slides=names, x=np.tile(x, slides), y=np.tile(y, slides))


def make_sgcl(model: str = "test_ssmamba", manifest=None, model_args=None, seen: bool = True, **arguments) -> SGCL:
    """`seen`: as if every tile had been looked at before, so that all rows of the banks count."""
    torch.manual_seed(0)
    encoder = timm.create_model(model, num_classes=0, **(model_args or {}))
    sgcl = SGCL(encoder, grid_manifest() if manifest is None else manifest, **arguments)
    for name, buffer in sgcl.named_buffers():
        if name.endswith(".seen"):
            buffer.fill_(seen)
    return sgcl


def make_batch(index=(0, 7, 40, 71), img_size: int = 64, crop_size: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(index))
    return {
        "image": torch.randn(len(index), 3, img_size, img_size, generator=generator),
        "crops": torch.randn(len(index), 4, 3, crop_size, crop_size, generator=generator),
        "index": torch.tensor(index),
    }
