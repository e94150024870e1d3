"""Products of tokens with the weight of a linear layer, for inference in float32 on a CPU, by the faster library.

torch's own are those of Intel's MKL, which on AMD's CPUs leaves AVX-512 unused; oneDNN, which torch brings as well,
uses it wherever it is. Measured on an AMD EPYC of 2022 (Zen 4), two cores: 125 and 180 GFLOP/s.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ssmamba_models.ops.bias_gelu import bias_gelu_

_CPUS = Path("/proc/cpuinfo")


class Product(Protocol):
    """x W^T and what follows it, for a weight (N, K) that serves several pieces (M, K) of a map."""

    def into(self, out: Tensor, x: Tensor) -> None:
        """Write x W^T over `out` (M, N)."""

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add x W^T + bias to `out` (M, N)."""

    def gelu(self, x: Tensor) -> Tensor:
        """gelu(x W^T + bias), (M, N): exact GELU."""


def product(weight: Tensor, bias: Tensor | None, x: Tensor, rows: int) -> Product:
    """The product of `x` (..., K), taken about so many rows at a time, with `weight` (N, K) and `bias` (N,).

    For inference, and made anew for each map: oneDNN's holds a copy of the weight in an order of its own, so it must
    not outlive a change of the weight. torch.backends.mkldnn.flags(enabled=False) asks for torch's own.
    """
    # Tensors without data, which only tell shapes, have no such order.
    if is_packed_faster() and type(x) is Tensor and torch.backends.mkldnn.enabled:
        return PackedProduct(weight, bias, rows)
    return TorchProduct(weight, bias)


@cache
def is_packed_faster() -> bool:
    """Whether this is a CPU of AMD's with AVX-512, and this torch has both libraries."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or not _is_amd():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))


def _is_amd() -> bool:
    try:
        text = _CPUS.read_text()
    except OSError:
        text = platform.processor()  # on Windows "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD"
    return "AuthenticAMD" in text


class TorchProduct:
    """By torch's own functions, which write over what is there."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight.t(), bias

    def into(self, out: Tensor, x: Tensor) -> None:
        torch.mm(x, self.weight, out=out)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        if self.bias is not None:
            out += self.bias
        torch.addmm(out, x, self.weight, out=out)

    def gelu(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return bias_gelu_(torch.mm(x, self.weight), self.bias)


class PackedProduct:
    """By oneDNN, through the operators that torch.compile uses, with the weight brought into its order once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows), bias

    def into(self, out: Tensor, x: Tensor) -> None:
        out.copy_(self._linear(x))

    def add_to(self, out: Tensor, x: Tensor) -> None:
        out += self._linear(x)

    def gelu(self, x: Tensor) -> Tensor:
        return self._linear(x, "gelu", "none")

    def _linear(self, x: Tensor, then: str = "none", how: str = "") -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], how)


if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *args: object, **kwargs: object) -> int:
        flops = 2 * weight_shape[0]
        for size in x_shape:
            flops *= size
        return flops
