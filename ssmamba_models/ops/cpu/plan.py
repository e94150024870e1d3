"""A network of fused CPU operators: weights packed for one instruction set, and the call that runs them.

The structs here and in plan.h must agree field by field.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmamba_models.ops.alignment import aligned
from ssmamba_models.ops.cpu import library
from ssmamba_models.ops.cpu.threads import run_tasks

i64, f64, ptr = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
MAX_STAGES, MAX_SCANS = 16, 8
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LANES = 16
# What C reads, whatever torch's default type and device are.
_FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}
PRODUCTS = ("float32", "bfloat16", "int8")  # FLOATS, BFLOATS, BYTES of plan.h


@dataclass(frozen=True)
class InstructionSet:
    """One compilation of the operators.

    Attributes:
        name: "generic", "avx2", "avx512", "avx512_bf16" or "amx_bf16"; "avx_vnni", "avx512_vnni" or "amx_int8".
        index: its place in the C library's list, from the simplest to the best.
        usable: whether this CPU and system can run it.
        panel: columns of a packed panel.
        k_grain: what the length of a row is padded to.
        products: what its matrix products multiply, "float32", "bfloat16" or "int8". Those of int8 hold the linear
            layers of blocks alone, beside another set.
    """

    name: str
    index: int
    usable: bool
    panel: int
    k_grain: int
    products: str


class _TableFacts(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * 32), ("usable", i64), ("panel", i64), ("k_grain", i64), ("products", i64))


@functools.cache
def instruction_sets() -> tuple[InstructionSet, ...]:
    """All that the library was built with, from the simplest to the best; none where there is no library."""
    handle, _ = library.open_library()
    found: list[InstructionSet] = []
    if handle is None:
        return ()
    facts = _TableFacts()
    while handle.ssmamba_plan_table(ctypes.addressof(facts), len(found), 0):
        name = facts.name.decode()
        products = PRODUCTS[facts.products]
        found.append(InstructionSet(name, len(found), bool(facts.usable), facts.panel, facts.k_grain, products))
    return tuple(found)


def usable_instruction_sets(products: Collection[str]) -> list[InstructionSet]:
    """The sets that run here and multiply one of `products`, from the simplest to the best.

    Raises:
        RuntimeError: there is no library.
    """
    if not instruction_sets():
        _, reason = library.open_library()
        raise RuntimeError(f"{reason}; {library.CURE}")
    return [s for s in instruction_sets() if s.usable and s.products in products]


# ---- the structs of plan.h ----


class Linear(ctypes.Structure):
    _fields_ = (("weight", ptr), ("bias", ptr), ("scale", ptr), ("n", i64), ("k", i64))


class Depthwise(ctypes.Structure):
    _fields_ = (("taps", ptr), ("bias", ptr))


class Norm(ctypes.Structure):
    _fields_ = (("weight", ptr), ("bias", ptr), ("eps", f64))


class Scan(ctypes.Structure):
    _fields_ = (
        *((name, i64) for name in ("scale", "offset", "width", "rank", "states")),
        ("x_proj", Linear),
        *((name, ptr) for name in ("dt_proj", "A", "D", "dt_bias")),
    )


class Block(ctypes.Structure):
    _fields_ = (
        ("lpr", Depthwise),
        ("conv", Depthwise),
        *((name, f64) for name in ("eps1", "eps_dms", "eps2")),
        *((name, Linear) for name in ("in_proj", "out_proj", "fc1", "fc2")),
        ("scans", i64),
        ("scan", ctypes.POINTER(Scan)),
    )


class Stage(ctypes.Structure):
    _fields_ = (("dim", i64), ("conv", Linear), ("norm", Norm), ("blocks", i64), ("block", ctypes.POINTER(Block)))


class Network(ctypes.Structure):
    _fields_ = (
        ("in_chans", i64),
        ("stem_dim", i64),
        ("conv1", Linear),
        ("norm1", Norm),
        ("stages", i64),
        ("stage", ctypes.POINTER(Stage)),
    )


class _Crew(ctypes.Structure):
    _fields_ = (
        ("ticket", ctypes.c_uint64),
        ("words", ctypes.c_uint32 * 4),
        ("slots", ctypes.c_uint64 * 24),
    )


class _Run(ctypes.Structure):
    _fields_ = (
        ("network", ctypes.POINTER(Network)),
        ("batch", i64),
        ("height", i64),
        ("width", i64),
        ("images", ptr),
        ("strides", i64 * 4),
        ("maps", ptr * MAX_STAGES),
        ("stages", i64),
        ("map_dtype", i64),
        ("instructions", i64),
        ("linear_instructions", i64),
        ("threads", i64),
        ("memory", i64),
        ("workspace", ptr),
        ("crew", _Crew),
    )


# ---- packing ----

# Neighbours in a row that a packed panel keeps together, and what they are stored as.
_ELEMENTS = {"float32": (1, torch.float32), "bfloat16": (2, torch.bfloat16), "int8": (4, torch.uint8)}


class Packer:
    """Brings weights into the order that an instruction set's operators read, and keeps the memory they lie in."""

    def __init__(self, instructions: InstructionSet) -> None:
        self.instructions = instructions
        self.kept: list[Any] = []

    def keep(self, x: Tensor) -> int:
        """The address of `x`, contiguous, for as long as the packer lives."""
        x = x.detach().contiguous().clone()
        self.kept.append(x)
        return x.data_ptr()

    def array(self, kind: Any, items: Sequence[ctypes.Structure]) -> Any:
        array = (kind * max(1, len(items)))(*items)
        self.kept.append(array)
        return ctypes.cast(array, ctypes.POINTER(kind))

    def linear(
        self, weight: Tensor, bias: Tensor | None = None, norm: Tensor | None = None, norm_bias: Tensor | None = None
    ) -> Linear:
        """Pack `weight` (n, k) and `bias` (n,). A layer norm's weight and bias (k,) before it are folded into both."""
        weight = weight.detach().double()
        n, k = weight.shape
        shift = torch.zeros(n, dtype=torch.float64, device="cpu") if bias is None else bias.detach().double()
        if norm_bias is not None:
            shift = shift + weight @ norm_bias.detach().double()
        if norm is not None:
            weight = weight * norm.detach().double()
        packed, scale = self._panels(weight.float())
        bias_row = torch.zeros(scale.numel(), **_FLOATS)
        bias_row[:n] = shift.float()
        return Linear(self.keep(packed), self.keep(bias_row), self.keep(scale), n, k)

    def _panels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`weight` (n, k) as Linear.weight of plan.h, and the scale of each row, 1 where products are not of int8."""
        panel, grain = self.instructions.panel, self.instructions.k_grain
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % grain, 0, -weight.shape[0] % panel))
        scale = torch.ones(padded.shape[0], **_FLOATS)
        if self.instructions.products == "int8":
            scale = padded.abs().amax(1) / 127
            padded = 128 + torch.nan_to_num(padded / scale[:, None]).round()
        together, dtype = _ELEMENTS[self.instructions.products]
        panels = padded.to(dtype).view(len(padded) // panel, panel, padded.shape[1] // together, together)
        return panels.permute(0, 2, 1, 3), scale

    def depthwise(self, weight: Tensor, bias: Tensor, residual: bool) -> Depthwise:
        """Pack `weight` (C, 1, 3, 3) and `bias` (C,); with `residual` the map itself is added."""
        taps = weight.detach().float().flatten(1).t().clone()
        if residual:
            taps[4] += 1.0  # the kernel's centre
        return Depthwise(self.keep(_padded(taps)), self.keep(_padded(bias.detach().float())))

    def norm(self, weight: Tensor, bias: Tensor, eps: float) -> Norm:
        return Norm(self.keep(weight.detach().float()), self.keep(bias.detach().float()), eps)

    def scan(self, scale: int, offset: int, parameters: Mapping[str, Tensor]) -> Scan:
        """Pack the parameters of a DirectionalSSM, by their names there.

        Args:
            scale: its pooling factor.
            offset: its first channel among those of DMS.
            parameters: x_proj.weight, dt_proj.weight, dt_bias, A_log, B_bias, D.
        """
        directions, width, states = parameters["A_log"].shape
        rank = parameters["dt_proj.weight"].shape[1]
        x_bias = torch.zeros(rank + 2 * directions * states, dtype=torch.float64, device="cpu")
        x_bias[rank : rank + directions * states] = parameters["B_bias"].detach().double().flatten()
        dt_proj = _padded(parameters["dt_proj.weight"].detach().float().t())
        return Scan(
            scale,
            offset,
            width,
            rank,
            states,
            self.linear(parameters["x_proj.weight"], x_bias),
            self.keep(dt_proj),
            self.keep(-torch.exp(parameters["A_log"].detach().float())),
            self.keep(parameters["D"].detach().float()),
            self.keep(parameters["dt_bias"].detach().float()),
        )


def _padded(x: Tensor) -> Tensor:
    """The last dimension filled with zeros to a multiple of 16."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % LANES))


# ---- running ----


def run_network(
    network: Network,
    instructions: InstructionSet,
    linear_instructions: InstructionSet,
    map_dtype: torch.dtype,
    images: Tensor,
    wanted: Sequence[int],
    memory: int,
) -> list[Tensor]:
    """Compute the maps of some stages.

    Args:
        network: packed for `instructions`, the linear layers of its blocks for `linear_instructions`.
        map_dtype: float32 or bfloat16, of the maps inside blocks.
        images: (B, C, H, W) float32 on the CPU, with any strides.
        wanted: indices of stages, ascending; those after the last are not computed.
        memory: bytes of working memory above which threads share the work on each image, not the images.

    Returns:
        Maps (B, h, w, dim) float32, in the order of `wanted`.
    """
    images = aligned(images)
    batch, _, height, width = images.shape
    maps = []
    run = _Run(ctypes.pointer(network), batch, height, width, images.data_ptr())
    run.strides[:] = images.stride()
    h, w = -(-height // 2), -(-width // 2)
    for i in range(wanted[-1] + 1):
        h, w = -(-h // 2), -(-w // 2)
        if i in wanted:
            maps.append(torch.empty(batch, h, w, network.stage[i].dim, **_FLOATS))
            run.maps[i] = maps[-1].data_ptr()
    if batch == 0:
        return maps
    handle, _ = library.open_library()
    assert handle is not None  # packed weights cannot be without
    run.stages, run.map_dtype, run.instructions = wanted[-1] + 1, DTYPES[map_dtype], instructions.index
    run.linear_instructions = linear_instructions.index
    run.threads, run.memory = torch.get_num_threads(), memory
    size = handle.ssmamba_plan_workspace(ctypes.addressof(run), 0, 0)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    run.workspace = workspace.data_ptr()
    run_tasks(handle, "ssmamba_plan_run", ctypes.addressof(run), run.threads, float("inf"))
    return maps


def run_struct_bytes() -> tuple[int, int]:
    """The size of the largest struct here and in C, which must agree."""
    handle, _ = library.open_library()
    assert handle is not None
    return ctypes.sizeof(_Run), handle.ssmamba_plan_run_bytes(0, 0, 0)
