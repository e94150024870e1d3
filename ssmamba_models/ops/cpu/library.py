"""Finding and opening the compiled kernels."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os

CURE = (
    "install a C compiler (Debian: apt-get install gcc; macOS: xcode-select --install) and reinstall: "
    "pip install --force-reinstall --no-deps --no-cache-dir ssmamba-models"
)
FUNCTIONS = (
    "ssmamba_directional_forward",
    "ssmamba_directional_backward",
    "ssmamba_selective_forward",
    "ssmamba_selective_backward",
    "ssmamba_conv_forward",
    "ssmamba_conv_backward",
    "ssmamba_depthwise_forward",
    "ssmamba_depthwise_backward",
    "ssmamba_norm_forward",
    "ssmamba_norm_backward",
    "ssmamba_gelu_forward",
    "ssmamba_gelu_backward",
    "ssmamba_plan_table",
    "ssmamba_plan_workspace",
    "ssmamba_plan_run",
    "ssmamba_plan_run_bytes",
)


@functools.cache
def open_library() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and why there is none."""
    spec = importlib.util.find_spec("ssmamba_models.ops.cpu._kernels")
    if spec is None or not spec.origin or not os.path.isfile(spec.origin):
        return None, "the C kernels were not built when the package was installed"
    try:
        return load(spec.origin), ""
    except (OSError, AttributeError) as error:
        return None, f"the C kernels could not be loaded ({error})"


def load(path: str) -> ctypes.CDLL:
    """The library in a file.

    Raises:
        OSError, AttributeError: it does not load, or lacks a function.
    """
    library = ctypes.CDLL(path)
    for name in FUNCTIONS:
        function = getattr(library, name)
        function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        function.restype = ctypes.c_int64 if name.startswith("ssmamba_plan") else ctypes.c_int
    team = library.ssmamba_team_run
    team.argtypes = (ctypes.c_void_p, ctypes.c_uint, *(ctypes.c_void_p,) * 2, *(ctypes.c_int64,) * 2)
    team.restype = ctypes.c_int
    return library
