"""Where a model computes, and in what: devices by name, precisions by name."""

from __future__ import annotations

import torch

from ssmamba_models.choices import ENCODER_PRECISIONS, PRECISIONS
from ssmamba_models.notice import first_line


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, or a GPU where there is one (ValueError: it cannot be used)."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        # Reading a result tells a device that computes from one that only knows shapes (meta).
        (torch.ones(1, device=place) + 1).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"device {str(device)!r} cannot be used ({first_line(error)}); use --device cpu, `ssmamba doctor` says more"
        ) from error
    return place


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute under bfloat16 autocast; "auto" does where a GPU has it in hardware.

    Raises:
        ValueError: no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def encoder_dtype(precision: str, device: torch.device) -> str:
    """What an encoder computes in, as `inference.optimize` names it: "float32", "bfloat16" or "int8".

    Raises:
        ValueError: no such precision.
    """
    if precision not in ENCODER_PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(ENCODER_PRECISIONS)}")
    if precision == "int8":
        return "int8"
    return "bfloat16" if use_bf16(precision, device) else "float32"
