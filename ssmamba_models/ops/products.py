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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

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


def product(weight: Tensor, bias: Tensor | None, x: Tensor, grain: int) -> Product:
    """The product of `x` (..., K), taken about 16 `grain` rows at a time, with `weight` (N, K) and `bias` (N,).

    For inference, and made anew for each map: oneDNN's holds a copy of the weight in an order of its own, so it must
    not outlive a change of the weight. torch.backends.mkldnn.flags(enabled=False) asks for torch's own.
    """
    # Tensors without data, which only tell shapes, have no such order, and tangents would be lost.
    plain = type(x) is Tensor and forward_ad.unpack_dual(x).tangent is None
    if plain and is_packed_faster() and torch.backends.mkldnn.enabled:
        return PackedProduct(weight, bias, grain)
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
        told = _CPUS.read_bytes()
    except OSError:
        told = platform.processor().encode()  # on Windows "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD"
    return b"AuthenticAMD" in told


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
    """By oneDNN, through the operators that torch.compile uses, with the weight brought into its order once.

    For every new number of rows oneDNN compiles a kernel and keeps it, so rows are filled up to a multiple of `grain`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, grain: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16 * grain)
        self.bias = None if bias is None else bias.detach().contiguous()  # the operator looks at no strides
        self.grain = grain

    def into(self, out: Tensor, x: Tensor) -> None:
        out.copy_(self._linear(x))

    def add_to(self, out: Tensor, x: Tensor) -> None:
        out += self._linear(x)

    def gelu(self, x: Tensor) -> Tensor:
        return self._linear(x, "gelu", "none")

    def _linear(self, x: Tensor, then: str = "none", how: str = "") -> Tensor:
        rows = len(x)
        missing = -rows % self.grain
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], how)[:rows]
