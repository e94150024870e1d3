"""Small MAMIM modules, and batches of synthetic views for them."""

import timm
import torch

from ssmamba_models.data.synthetic import synthetic_he
from ssmamba_models.ssl.mamim import MAMIM
from ssmamba_models.ssl.mamim_views import MamimViews


def make(model="test_ssmamba", scan_init="silent", **arguments):
    torch.manual_seed(0)
    return MAMIM(timm.create_model(model, scan_init=scan_init), **({"cell_size": 16, "decoder_dim": 32} | arguments))


def make_batch(count=4, img_size=64, cell_size=16, **arguments):
    views = MamimViews(img_size, cell_size, **arguments)
    drawn = [views(synthetic_he(96, seed=i), torch.Generator().manual_seed(i)) for i in range(count)]
    return {name: torch.stack([view[name] for view in drawn]) for name in drawn[0]}


def hide(batch, view, cell=16):
    mask = batch[f"{view}_mask"].repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    return mask[:, None].expand_as(batch[view])
