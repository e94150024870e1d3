"""Who takes part: an operator on each backend, its definition, and what torch itself offers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmamba_models import ops
from ssmamba_models.benchmark.op_cases import OpCase, OpInputs, make_inputs
from ssmamba_models.benchmark.timing import time_interleaved
from ssmamba_models.ops import reference
from ssmamba_models.threads import use_threads

REFERENCE = "reference"  # the naive definition, called without any dispatch
CONV1D = "torch conv1d"  # torch's own grouped convolution, then SiLU

PASSES = ("forward", "backward", "forward+backward")

Function = Callable[[OpInputs], Tensor]
Outcome = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """A way to compute an operator.

    Attributes:
        name: for tables and reports.
        function: from inputs to the operator's output.
        backend: to force while `function` and its backward run; None where `ops` does not dispatch.
        threads: CPU threads to run with; None for those in force.
    """

    name: str
    function: Function
    backend: str | None = None
    threads: int | None = None


def choose_backends(wanted: tuple[str, ...] | None, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The backends to measure on `device`, and why each of the others is not.

    Args:
        wanted: names of backends, or None for all that can run; the reference always runs.

    Raises:
        ValueError: if a name in `wanted` is unknown, or cannot run here.
    """
    known = {name: info for name, info in ops.backends()["backends"].items() if name != REFERENCE}
    missing = {name: why for name, info in known.items() if (why := _why_not(info, device))}
    for name in wanted or ():
        if name != REFERENCE and name not in known:
            raise ValueError(f"backend {name!r} is unknown; expected one of {', '.join([REFERENCE, *known])}")
        if name in missing:
            raise ValueError(f"backend {name!r} cannot run on {device}: {missing[name]}")
    chosen = [name for name in known if name not in missing and (wanted is None or name in wanted)]
    return chosen, missing


def _why_not(info: dict, device: torch.device) -> str | None:
    if not info["available"]:
        return ". ".join(part.rstrip(".") for part in (info["reason"], info["cure"]) if part)
    if not {device.type, "any"} & set(info["devices"]):
        return f"it runs on {', '.join(info['devices'])} only"
    return None


def contenders_for(op: str, backends: list[str]) -> list[Contender]:
    """Those who compute `op`, the reference first."""
    contenders = [Contender(REFERENCE, _call_reference(op))]
    contenders += [Contender(name, _call_operator(op), name) for name in backends]
    if op == "causal_conv1d":
        contenders.append(Contender(CONV1D, _grouped_conv1d))
    return contenders


def _call_reference(op: str) -> Function:
    naive = getattr(reference, op)

    def function(inputs: OpInputs) -> Tensor:
        y = naive(**inputs.arguments())
        return y[0] if isinstance(y, tuple) else y

    return function


def _call_operator(op: str) -> Function:
    operator = getattr(ops, op)
    return lambda inputs: operator(**inputs.arguments())


def _grouped_conv1d(inputs: OpInputs) -> Tensor:
    x, weight, bias = (inputs.tensors[name] for name in ("x", "weight", "bias"))
    y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])
    return F.silu(y[..., : x.shape[2]])


@contextlib.contextmanager
def _terms_of(contender: Contender) -> Iterator[None]:
    # Within what is timed: nothing is looked up for those in force.
    threads = contextlib.nullcontext() if contender.threads is None else use_threads(contender.threads)
    with threads, forced_backend(contender.backend):
        yield


@contextlib.contextmanager
def forced_backend(name: str | None) -> Iterator[None]:
    """Have `ops` use one backend; the variable is read at every call, so the backward must lie within as well."""
    before = os.environ.get("SSMAMBA_BACKEND")
    if name is not None:
        os.environ["SSMAMBA_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("SSMAMBA_BACKEND", None)
        else:
            os.environ["SSMAMBA_BACKEND"] = before


def faster_reference(contender: Contender, case: OpCase, dtype: torch.dtype, device: torch.device) -> Contender:
    """The reference with one thread or with those in force, whichever is faster.

    Its loop of tiny operators gains little from a second thread, and on a busy machine loses a hundredfold to the
    barriers between them; a ratio to that would flatter every backend. A short sequence decides: one step costs the
    same in any.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return contender
    short = make_inputs(case.shortened(), dtype, device)
    alone = replace(contender, threads=1)
    calls = {"one": make_call(alone, short, "forward"), "all": make_call(contender, short, "forward")}
    timings = time_interleaved(calls, rounds=5, sample_ms=5.0, budget_s=5.0)
    return contender if timings["all"].median_ms < timings["one"].median_ms else alone


def make_call(contender: Contender, inputs: OpInputs, which: str) -> Callable[[], Outcome]:
    """A function without arguments that runs one pass and returns what it made: y, gradients, or both."""
    function = contender.function
    leaves = tuple(inputs.tensors.values())

    def forward() -> Outcome:
        with _terms_of(contender), torch.no_grad():
            return (function(inputs),)

    def both() -> Outcome:
        with _terms_of(contender):
            y = function(inputs)
            return (y.detach(), *torch.autograd.grad(y, leaves, inputs.grad_out))

    if which == "forward":
        return forward
    if which == "forward+backward":
        return both

    with _terms_of(contender):
        kept = function(inputs)

    def backward() -> Outcome:
        with _terms_of(contender):
            return torch.autograd.grad(kept, leaves, inputs.grad_out, retain_graph=True)

    return backward
