"""From tensors to launches: the three passes of a scan, the passes of its gradient, and the one place that launches."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssmamba_models.ops.triton import backward, carry, forward
from ssmamba_models.ops.triton.walk import THREADS, Cut, Walk, chunks_of, cut, is_fast, programs_of, span

WARPS = THREADS // 32
CARRY_CHANNELS = 32
CARRY_CHUNKS = 32
MOST_PROGRAMS = 2**31 - 1


def launch(
    kernel: Any, programs: int, arguments: Mapping[str, Any], constants: Mapping[str, Any], warps: int = WARPS
) -> None:
    """Start `programs` programs of a kernel on the device of its tensors.

    Raises:
        ValueError: more programs than a grid holds.
    """
    if programs > MOST_PROGRAMS:
        raise ValueError(f"the tensors need {programs} programs, a grid holds {MOST_PROGRAMS}; split the batch")
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **constants, num_warps=warps, num_stages=1)


def named(prefix: str, names: tuple[str, ...], values: tuple[int, ...]) -> dict[str, int]:
    """Values under the names `prefix_name`, as the kernels call them."""
    return {f"{prefix}_{name}": value for name, value in zip(names, values, strict=True)}


PLACES = ("batch", "line", "step", "channel")
PROJECTION = ("batch", "line", "step", "row", "state")


@dataclass
class Scan:
    """The tensors of a scan, and how one launch reads them.

    Attributes:
        u, delta, z: (batch, ...) in any strides; z or None.
        B, C: of equal strides, which `projection` gives: batch, line, step, row (direction or group) and state.
        A: (K, channels, N); bias (K, channels); D (channels,): float32, contiguous.
        hold: (batch, pixels) uint8, contiguous, its line and step strides in `hold_strides`.
        first, sides: this launch scans directions first and, with two sides, first + 2 in reverse.
    """

    walk: Walk
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    bias: Tensor | None
    projection: tuple[int, ...]
    softplus: bool
    z: Tensor | None = None
    hold: Tensor | None = None
    hold_strides: tuple[int, int] = (0, 0)
    first: int = 0
    sides: int = 1
    tile: Cut = field(init=False)

    def cut(self, backward: bool) -> Scan:
        self.tile = cut(self.walk, self.A.shape[2], backward)
        return self

    @property
    def directions(self) -> int:
        return self.A.shape[0]

    def tensors(self, *names: str) -> dict[str, Tensor | None]:
        return {f"{name}_ptr": getattr(self, name) for name in names}

    def strides(self, *tensors: str) -> dict[str, int]:
        """Strides of the tensors named, of B and C, and of hold."""
        found = {}
        for name in tensors:
            # y, the gradients and what is summed on the way are contiguous tensors of u's shape.
            x = torch.empty(self.u.shape, device="meta") if name == "y" else getattr(self, name)
            found.update(named(name[0], PLACES, self.walk.strides(x)))
        found.update(named("b", PROJECTION, self.projection))
        found.update(hold_line=self.hold_strides[0], hold_step=self.hold_strides[1])
        return found

    def sizes(self) -> dict[str, int]:
        walk = self.walk
        return {
            "batch": walk.batch,
            "groups": walk.groups,
            "group_channels": walk.group_channels,
            "lines": walk.lines,
            "length": walk.length,
            "first": self.first,
            "K": self.directions,
        }

    def constants(self, *others: Tensor | None) -> dict[str, Any]:
        tile = self.tile
        summaries = chunks_of(self.walk, tile) * self.walk.channels
        tensors = (self.u, self.delta, self.z, self.B, self.C, self.hold, *others)
        farthest = max(span(*tensors), self.u[0].numel(), summaries)
        return {
            "T": tile.steps,
            "M": tile.rows,
            "DB": tile.block,
            "N": self.A.shape[2],
            "SIDES": self.sides,
            "SOFTPLUS": self.softplus,
            "FAST": is_fast(self.u),
            "RAGGED": self.walk.length % tile.steps != 0,
            # Masked lanes compute addresses up to one tile behind the end, hence the margin.
            "WIDE": 2 * farthest >= 2**31,
        }

    def start(self, kernel: Any, arguments: dict[str, Any], others: tuple[Tensor | None, ...] = ()) -> None:
        launch(kernel, programs_of(self.walk, self.tile), {**arguments, **self.sizes()}, self.constants(*others))


@dataclass
class Summaries:
    """What chunks do, then what they start with; float32.

    Attributes:
        steps: (batch, K, capacity, channels), sums of step sizes.
        states: (batch, K, N, capacity, channels); adjoints alike, for a backward.
        counts: how many chunks the even directions have, and the odd ones.
    """

    steps: Tensor
    states: Tensor
    adjoints: Tensor | None
    counts: tuple[int, int]

    @classmethod
    def empty(cls, scans: list[Scan], backward: bool) -> Summaries:
        """For the launches of one operator: [rows, columns] or a single one."""
        A, walk = scans[0].A, scans[0].walk
        counts = [chunks_of(scan.walk, scan.tile) for scan in scans]
        shape = (walk.batch, A.shape[0], A.shape[2], max(counts), walk.channels)
        states = A.new_empty(shape)
        adjoints = torch.empty_like(states) if backward else None
        return cls(A.new_empty(shape[:2] + shape[3:]), states, adjoints, (counts[0], counts[-1]))

    @property
    def capacity(self) -> int:
        return self.steps.shape[2]

    def carry(self, A: Tensor, initial: Tensor | None = None, last: Tensor | None = None) -> None:
        """Turn the states at chunk ends into those at chunk starts."""
        self._carry(A, self.states, initial, last, False)

    def carry_adjoints(self, A: Tensor, initial: Tensor | None = None) -> None:
        self._carry(A, self.adjoints, initial, None, True)

    def _carry(self, A: Tensor, states: Tensor, initial: Tensor | None, last: Tensor | None, adjoint: bool) -> None:
        batch, k, n, capacity, channels = states.shape
        arguments = {
            "steps_ptr": self.steps,
            "state_ptr": states,
            "A_ptr": A,
            "initial_ptr": initial,
            "last_ptr": last,
            "capacity": capacity,
            "even_chunks": self.counts[0],
            "odd_chunks": self.counts[1],
            "channels": channels,
            "K": k,
        }
        wide = 2 * capacity * channels >= 2**31
        at_once = CARRY_CHUNKS if capacity > 8 else 8
        constants = {"N": n, "U": at_once, "DB": CARRY_CHANNELS, "ADJOINT": adjoint, "WIDE": wide}
        launch(carry.carry_kernel, batch * k * n * -(-channels // CARRY_CHANNELS), arguments, constants, warps=1)


INPUTS = ("u", "delta", "B", "A", "bias", "hold")


def summarise(scan: Scan, to: Summaries) -> None:
    """First pass of a forward."""
    arguments = {
        **scan.tensors(*INPUTS),
        "steps_ptr": to.steps,
        "state_ptr": to.states,
        **scan.strides("u", "delta"),
        "capacity": to.capacity,
    }
    scan.start(forward.summary_kernel, arguments)


def finish(scan: Scan, carried: Summaries, y: Tensor, so_far: Tensor | None = None) -> None:
    """Last pass of a forward: y (contiguous), to which `so_far` is added."""
    arguments = {
        **scan.tensors(*INPUTS, "C", "D", "z"),
        "carry_ptr": carried.states,
        "sum_ptr": so_far,
        "y_ptr": y,
        **scan.strides("u", "delta", "z", "y"),
        "capacity": carried.capacity,
    }
    scan.start(forward.output_kernel, arguments)


def summarise_backward(scan: Scan, grad: Tensor, to: Summaries) -> None:
    """First pass of a backward; grad is contiguous."""
    arguments = {
        **scan.tensors(*INPUTS, "C", "z"),
        "grad_ptr": grad,
        "steps_ptr": to.steps,
        "state_ptr": to.states,
        "adjoint_ptr": to.adjoints,
        **scan.strides("u", "delta", "z", "y"),
        "capacity": to.capacity,
    }
    scan.start(backward.backward_summary_kernel, arguments)


@dataclass
class Gradients:
    """What one launch of the gradient kernel writes; dA, dbias, dD, dB and dC are partial sums along dimension 0.

    Attributes:
        du, ddelta, dz: like u, contiguous.
        dA: (parts, sides, N, channels). dbias: (parts, sides, channels). dD: (parts, channels).
        dB, dC: (channel blocks, *shape of B), contiguous.
    """

    du: Tensor
    ddelta: Tensor
    dz: Tensor | None
    dA: Tensor
    dbias: Tensor
    dD: Tensor | None
    dB: Tensor
    dC: Tensor

    @classmethod
    def empty(cls, scan: Scan, dtype: torch.dtype, dB: Tensor, dC: Tensor, with_dD: bool) -> Gradients:
        walk, tile, new = scan.walk, scan.tile, scan.A.new_empty
        parts = walk.batch * -(-chunks_of(walk, tile) // tile.rows)
        return cls(
            du=scan.u.new_empty(scan.u.shape, dtype=dtype),
            ddelta=scan.u.new_empty(scan.u.shape, dtype=dtype),
            dz=None if scan.z is None else scan.u.new_empty(scan.u.shape),
            dA=new(parts, scan.sides, scan.A.shape[2], walk.channels),
            dbias=new(parts, scan.sides, walk.channels),
            dD=new(parts, walk.channels) if with_dD else None,
            dB=dB,
            dC=dC,
        )


def projection_gradients(scan: Scan) -> tuple[Tensor, Tensor]:
    """Room for dB and dC: a copy per channel block, every element of which some program writes."""
    blocks = -(-scan.walk.group_channels // scan.tile.block)
    return tuple(scan.A.new_empty(blocks, *scan.B.shape) for _ in range(2))


def differentiate(
    scan: Scan,
    grad: Tensor,
    carried: Summaries,
    to: Gradients,
    strides: tuple[int, ...],
    so_far: Gradients | None = None,
) -> None:
    """Last pass of a backward; `strides` of dB: channel block, batch, line, step, row, state."""
    arguments = {
        **scan.tensors(*INPUTS, "C", "z", "D"),
        "grad_ptr": grad,
        "carry_ptr": carried.states,
        "adjoint_ptr": carried.adjoints,
        "du_sum_ptr": None if so_far is None else so_far.du,
        "ddelta_sum_ptr": None if so_far is None else so_far.ddelta,
        **{f"{name}_ptr": getattr(to, name) for name in ("du", "ddelta", "dz", "dA", "dD", "dbias", "dB", "dC")},
        **scan.strides("u", "delta", "z", "y"),
        **named("e", ("block", *PROJECTION), strides),
        "capacity": carried.capacity,
    }
    scan.start(backward.gradient_kernel, arguments, (to.dB[0],))
