"""The problems that the scans are measured on: shapes, inputs, and the bytes that cannot be avoided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DIRECTIONS = 4
# Of `OpInputs`: tensors, constants, streamed.
_Drawn = tuple[dict[str, Tensor], dict[str, object], tuple[str, ...]]


@dataclass(frozen=True)
class OpCase:
    """One operator on one shape.

    Attributes:
        op: "directional_scan", "selective_scan" or "causal_conv1d".
        shape: of the main input: (B, H, W, D) for directional_scan, (B, D, L) for the others.
        extra: state size N of a scan; number of taps W of a convolution.
    """

    op: str
    shape: tuple[int, ...]
    extra: int

    @property
    def label(self) -> str:
        what = "W" if self.op == "causal_conv1d" else "N"
        return f"{self.op} {str(self.shape).replace(' ', '')} {what}={self.extra}"

    def shortened(self) -> OpCase:
        """The same work per step over a few steps; a convolution, which has no steps, as it is."""
        if self.op == "directional_scan":
            batch, height, width, channels = self.shape
            return replace(self, shape=(batch, min(height, 2), min(width, 8), channels))
        if self.op == "selective_scan":
            return replace(self, shape=(*self.shape[:2], min(self.shape[2], 16)))
        return self


@dataclass(frozen=True)
class OpInputs:
    """Arguments of one call.

    Attributes:
        tensors: name -> tensor, all of which take a gradient.
        constants: name -> plain value.
        streamed: names of the tensors that grow with the length of the sequence; the rest are parameters.
        grad_out: the gradient that arrives at the output.
    """

    tensors: dict[str, Tensor]
    constants: dict[str, object]
    streamed: tuple[str, ...]
    grad_out: Tensor

    @property
    def main(self) -> Tensor:
        """The input that the output resembles in shape and dtype."""
        return self.tensors[self.streamed[0]]

    def arguments(self) -> dict[str, object]:
        return {**self.tensors, **self.constants}

    def in_float64(self) -> OpInputs:
        """The same numbers, rounding included, in float64."""
        exact = {name: x.detach().double().requires_grad_() for name, x in self.tensors.items()}
        return OpInputs(exact, self.constants, self.streamed, self.grad_out.double())

    def least_bytes(self, which: str) -> int:
        """Bytes that the pass has to move if it touches each element once.

        Forward reads the streamed inputs and writes the output; backward reads them and the output's gradient,
        and writes a gradient for each streamed input. Parameters are too small to count.
        """
        inputs = sum(_bytes(self.tensors[name]) for name in self.streamed)
        output = _bytes(self.main)
        return {
            "forward": inputs + output,
            "backward": 2 * inputs + output,
            "forward+backward": 3 * inputs + 2 * output,
        }[which]


# The maps of ssmamba_small at 224 px, the scans of a 1-D Mamba block over 14 x 14 tokens, and its convolution.
CASES = {
    "cpu": (
        OpCase("directional_scan", (8, 56, 56, 32), 1),
        OpCase("directional_scan", (8, 28, 28, 64), 1),
        OpCase("directional_scan", (8, 14, 14, 160), 1),
        OpCase("directional_scan", (8, 7, 7, 512), 1),
        OpCase("selective_scan", (8, 768, 196), 16),
        OpCase("selective_scan", (8, 768, 196), 1),
        OpCase("causal_conv1d", (8, 768, 196), 4),
    ),
    "cuda": (
        OpCase("directional_scan", (64, 56, 56, 32), 1),
        OpCase("directional_scan", (64, 28, 28, 64), 1),
        OpCase("directional_scan", (64, 14, 14, 160), 1),
        OpCase("directional_scan", (64, 7, 7, 512), 1),
        OpCase("selective_scan", (64, 768, 196), 16),
        OpCase("selective_scan", (64, 768, 196), 1),
        OpCase("causal_conv1d", (64, 768, 196), 4),
    ),
}


def make_inputs(case: OpCase, dtype: torch.dtype, device: torch.device | str) -> OpInputs:
    """Random inputs in the ranges that a model at its initialisation feeds the operator.

    Streamed tensors have `dtype`; the parameters of a scan are float32, as under autocast.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    drawn, constants, streamed = _MAKERS[case.op](case, normal)
    low = set(drawn) if case.op == "causal_conv1d" else set(streamed)
    tensors = {
        name: x.to(device, dtype if name in low else torch.float32).requires_grad_() for name, x in drawn.items()
    }
    grad_out = normal(*case.shape).to(device, dtype)
    return OpInputs(tensors, constants, streamed, grad_out)


def _directional_inputs(case: OpCase, normal: Callable[..., Tensor]) -> _Drawn:
    batch, height, width, channels = case.shape
    tensors = {
        "u": normal(*case.shape),
        "delta": 0.5 * normal(*case.shape),
        "A": _decay(case.extra).expand(DIRECTIONS, channels, case.extra).clone(),
        "B": normal(batch, height, width, DIRECTIONS, case.extra),
        "C": normal(batch, height, width, DIRECTIONS, case.extra),
        "D": torch.ones(channels),
        "delta_bias": normal(DIRECTIONS, channels) - 4.0,
    }
    return tensors, {}, ("u", "delta", "B", "C")


def _selective_inputs(case: OpCase, normal: Callable[..., Tensor]) -> _Drawn:
    batch, channels, length = case.shape
    tensors = {
        "u": normal(*case.shape),
        "delta": 0.5 * normal(*case.shape),
        "A": _decay(case.extra).expand(channels, case.extra).clone(),
        "B": normal(batch, 1, case.extra, length),
        "C": normal(batch, 1, case.extra, length),
        "D": torch.ones(channels),
        "delta_bias": normal(channels) - 4.0,
    }
    return tensors, {"delta_softplus": True}, ("u", "delta", "B", "C")


def _conv_inputs(case: OpCase, normal: Callable[..., Tensor]) -> _Drawn:
    channels = case.shape[1]
    tensors = {
        "x": normal(*case.shape),
        "weight": normal(channels, case.extra) / case.extra,
        "bias": normal(channels),
    }
    return tensors, {"activation": "silu"}, ("x",)


_MAKERS = {
    "directional_scan": _directional_inputs,
    "selective_scan": _selective_inputs,
    "causal_conv1d": _conv_inputs,
}


def _decay(states: int) -> Tensor:
    """A = -1, -2, ..., -N."""
    return -torch.arange(1.0, states + 1)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
