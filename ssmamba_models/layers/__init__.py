"""Layers that several architectures share."""

import warnings
from typing import Any

from ssmamba_models.layers.mamba import Mamba

__all__ = ["DMS", "LPR", "DirectionalSSM", "Mamba", "pool_hold"]


def __getattr__(name: str) -> Any:
    # SSMamba's own layers lived here in 0.1.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ssmamba_models import models

    warnings.warn(
        f"ssmamba_models.layers.{name} is deprecated, import it from ssmamba_models.models", DeprecationWarning, 2
    )
    return getattr(models, name)
