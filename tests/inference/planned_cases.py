"""Small models whose every parameter matters, and images for them."""

from __future__ import annotations

import torch

from ssmamba_models.models import SSMamba


@torch.no_grad()
def shaken(model: SSMamba) -> SSMamba:
    """The model with every parameter moved: fresh biases are 0, fresh norms 1, and would hide that one is forgotten."""
    for index, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=parameter.dtype)
        parameter += 0.1 * noise
    return model


def small(**changes) -> SSMamba:
    """A small shaken SSMamba whose scans matter, in eval mode."""
    torch.manual_seed(0)
    kwargs = {"dims": (16, 24, 40, 48), "depths": (1, 2, 1, 1), "scan_init": "unit", **changes}
    return shaken(SSMamba(**kwargs)).eval().requires_grad_(False)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
