"""State space vision models for computational pathology, in timm style.

Importing this package registers its models with timm: ``timm.create_model("ssmamba_small")`` works from then on.
"""

from typing import Any

from ssmamba_models._version import __version__

try:
    from ssmamba_models.ops import backends
    from ssmamba_models.zoo import create_model, list_models
except (ImportError, OSError, RuntimeError, AttributeError) as error:
    # `ssmamba doctor` must start where torch, torchvision or timm does not: it is there to say why.
    _why = error

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"ssmamba_models.{name} needs torch, torchvision and timm, which do not import here ({_why}); "
            "`ssmamba doctor` names the cure"
        ) from _why


__all__ = ["__version__", "backends", "create_model", "list_models"]
