"""State space vision models for computational pathology, in timm style.

Importing this package registers its models with timm: ``timm.create_model("ssmamba_small")`` works from then on. It
loads neither torch nor timm by itself: operators and models are registered as soon as those are there.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ssmamba_models._version import __version__
from ssmamba_models.registration import import_after

if TYPE_CHECKING:
    from ssmamba_models.inference import optimize
    from ssmamba_models.ops import backends
    from ssmamba_models.zoo import create_model, list_models

# What is imported when it is first asked for: name -> module that has it, or that it is.
_LAZY = {
    "backends": "ops",
    "create_model": "zoo",
    "list_models": "zoo",
    "optimize": "inference",
    **{name: name for name in ("inference", "layers", "models", "ops", "zoo")},
}

import_after("torch", f"{__name__}.ops")
import_after("timm", f"{__name__}.models")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # What torch, torchvision and timm raise where their builds do not fit each other.
        raise ImportError(
            f"ssmamba_models.{name} needs torch, torchvision and timm, which do not import here ({error}); "
            "`ssmamba doctor` names the cure"
        ) from error
    return module if _LAZY[name] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = ["__version__", "backends", "create_model", "list_models", "optimize"]
