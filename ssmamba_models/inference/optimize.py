"""optimize(model): the fastest way there is here to run a built model for inference."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmamba_models.inference.planned import PlannedSSMamba
from ssmamba_models.inference.represent import OptimizeError
from ssmamba_models.models import SSMamba
from ssmamba_models.notice import SSMambaWarning

PRECISIONS = ("float32", "bfloat16", "int8")


def optimize(model: nn.Module, precision: str = "float32", memory: int | None = None) -> nn.Module:
    """Make an inference module of a built model: the same outputs by the same methods, faster.

    An SSMamba on a CPU becomes a plan of fused operators (:class:`~ssmamba_models.inference.planned.PlannedSSMamba`),
    with its weights packed once: later changes of the model's weights do not reach it. For any other model the best
    public way is returned: itself in float32, or itself under bfloat16 autocast. (torch.compile is not used: on CPUs it
    compiles for a minute or more, anew for every image size. Wrap the model yourself where that pays.)

    Except for the model itself, the result returns float32 whatever the precision, and has `precision` and `plan`,
    which name what it computes in and by.

    Hooks that are global to torch see the optimised model and its head alone.

    Args:
        model: in eval mode. It stays as it is.
        precision: "float32", or "bfloat16" for products and maps in bfloat16 with sums, norms, scans and the residual
            stream in float32, or "int8" for that with the linear layers of blocks in int8, scaled by output and by
            token. int8 is for an SSMamba on a CPU with products of int8 (AVX-VNNI, AVX512-VNNI or AMX-INT8). With the
            packaged weights, pooled features keep a cosine of more than 0.999 to those of float32.
        memory: for an SSMamba on a CPU, bytes of working memory above which threads share the work on each image
            rather than take images of their own; None: 1 GiB.

    Returns:
        A module with forward, forward_features, forward_head and forward_intermediates, without trainable parameters.

    Raises:
        ValueError: an unknown precision, or one that this CPU has no products for; memory below 1.
        OptimizeError: a ValueError; the model is in training mode, or an SSMamba that the plan cannot represent: one
            with replaced layers, adapters (LoRA), hooks or parametrisations; int8 for another model or device, or
            without the C kernels.

    Example:
        >>> import timm, torch, ssmamba_models
        >>> model = timm.create_model("test_ssmamba", num_classes=0).eval()
        >>> fast = ssmamba_models.optimize(model)
        >>> with torch.inference_mode():
        ...     fast(torch.zeros(2, 3, 96, 96)).shape
        torch.Size([2, 48])
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {type(model).__name__}, expected a built model, such as of timm.create_model")
    if isinstance(model, (PlannedSSMamba, AutocastModel)):
        raise OptimizeError(f"the model is optimised already, in {model.precision}; pass the model that it was made of")
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
        raise ValueError(f"memory is {memory!r}, expected a number of bytes of at least 1, or None")
    if model.training:
        raise OptimizeError("the model is in training mode, expected inference; call model.eval() first")
    if isinstance(model, SSMamba) and PlannedSSMamba.runs_on(_device(model)):
        return PlannedSSMamba(model, precision, memory)
    if precision == "int8":
        raise OptimizeError(
            f"int8 is for an SSMamba on a CPU with the C kernels, the model is {type(model).__name__} on "
            f'{_device(model)}; use precision "bfloat16" or "float32" (`ssmamba doctor` tells which kernels are there)'
        )
    return AutocastModel(model) if precision == "bfloat16" else model


def optimized_or_eager(model: nn.Module, precision: str, name: str) -> nn.Module:
    """As :func:`optimize`, but a model that a plan cannot represent runs layer by layer, which a warning says once.

    Args:
        model, precision: as there.
        name: what the warning calls the model.

    Raises:
        OptimizeError: `precision` is "int8", in which nothing but a plan computes.

    Warns:
        SSMambaWarning: the model cannot be optimised.
    """
    try:
        return optimize(model, precision)
    except OptimizeError as error:
        if precision == "int8":
            raise  # nothing else computes in it
        _warn_once(f"{name} runs layer by layer: it cannot be optimised ({error})")
        return AutocastModel(model) if precision == "bfloat16" else model


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, SSMambaWarning, stacklevel=4)


def plan_of(model: nn.Module) -> str:
    """What a model of `optimize` computes by, for provenance: "eager", "autocast", or "fused, avx2" and the like."""
    return str(getattr(model, "plan", "eager"))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class AutocastModel(nn.Module):
    """A model under bfloat16 autocast, by the methods it has; results are float32."""

    plan, precision = "autocast", "bfloat16"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Configuration, widths, classifier, forward_features, ...: whatever the model has.
            value = getattr(super().__getattr__("model"), name)
        return self._in_bfloat16(value) if name.startswith("forward_") else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._in_bfloat16(self.model)(*args, **kwargs)

    def _in_bfloat16(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(_device(self.model).type, torch.bfloat16):
                return _as_float32(call(*args, **kwargs))

        return run


def _as_float32(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.float() if result.is_floating_point() else result
    if isinstance(result, (list, tuple)):
        return type(result)(_as_float32(part) for part in result)
    return result
