"""An SSMamba as a plan of fused CPU operators."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ssmamba_models.inference.represent import build_network, check_representable
from ssmamba_models.models import SSMamba
from ssmamba_models.ops import dispatch
from ssmamba_models.ops.cpu import plan
from ssmamba_models.ops.cpu.threads import one_thread_after_fork
from ssmamba_models.ops.derivatives import has_tangents

DEFAULT_MEMORY = 2**30
_TOLD = ["num_classes", "num_features", "head_hidden_size", "in_chans", "drop_rate", "feature_info", "output_fmt"]
_TOLD += ["pretrained_cfg", "default_cfg"]


class PlannedSSMamba(nn.Module):
    """The encoder as fused C operators, which read and write each map a few times only, and in the caches.

    A block is five kinds of operators: LPR; LayerNorm and W_in; the depthwise convolution and SiLU; for each scale
    pooling, the scan's projections and the scan; then, for some dozens of tokens at a time, everything up to the
    block's end: upsampling, LayerNorm, W_out, the residual, LayerNorm and the MLP. LayerNorms' weights are folded into
    the linear layers after them. Threads take images of their own where there are enough, otherwise they share
    each operator.

    With bfloat16, the packed weights, the inputs of products and the maps between operators are bfloat16; sums, norms,
    activations, the scan's states and the residual stream are float32. A CPU without bfloat16 products multiplies in
    float32.

    With int8, the linear layers of blocks (W_in, W_out, the MLP) multiply int8 instead, with int32 sums: weights by
    a scale of each output, their inputs by one of each token (in the MLP's hidden layer of each token and 512 columns).
    Everything else is as with bfloat16: convolutions of int8 would alone take the features' cosine to float32 below
    0.998, and the scans' projections are small.

    Args:
        model: an SSMamba in eval mode; weights are copied.
        precision: "float32", "bfloat16" or "int8".
        memory: bytes of working memory above which threads share the work on each image; None: 1 GiB.
        instructions: name of an instruction set, for int8 of the one that multiplies it; None: the best.

    Shape: as SSMamba's; results are float32.

    Raises:
        OptimizeError: the model cannot be represented.
        RuntimeError: called with gradients that would be lost, or while tracing; or there is no C library.
        ValueError: images that are not (B, in_chans, H, W), not on the CPU, or empty; no such instruction set here, or
            none for the precision.
    """

    def __init__(
        self, model: SSMamba, precision: str = "float32", memory: int | None = None, instructions: str | None = None
    ) -> None:
        super().__init__()
        check_representable(model)
        self.precision = precision
        self.memory = DEFAULT_MEMORY if memory is None else memory
        self.linear_instructions = _choose(precision, instructions)
        # Where products of int8 lose too much, the best that bfloat16 has.
        self.instructions = _choose("bfloat16", None) if precision == "int8" else self.linear_instructions
        names = [self.instructions.name, self.linear_instructions.name]
        self.plan = ", ".join(["fused", *dict.fromkeys(names)])
        for name in _TOLD:
            if hasattr(model, name):
                setattr(self, name, copy.deepcopy(getattr(model, name)))
        self.head = copy.deepcopy(model.head).float().requires_grad_(False)
        self._packers = plan.Packer(self.instructions), plan.Packer(self.linear_instructions)
        self._network = build_network(model, *self._packers)
        self._stages = len(model.stages)
        self._map_dtype = torch.float32 if precision == "float32" else torch.bfloat16
        self.eval()

    @staticmethod
    def runs_on(device: torch.device) -> bool:
        """Whether the operators are there for this device, and no other backend is asked for."""
        return device.type == "cpu" and dispatch.is_served_by("c", "cpu")

    def train(self, mode: bool = True) -> PlannedSSMamba:
        """Stays in inference; `mode` True is an error."""
        if mode:
            raise RuntimeError("an optimised model is for inference alone; train the model that it was made of")
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedSSMamba:
        # Packed weights never change, so that copies may share them.
        twin = self.__new__(type(self))
        nn.Module.__init__(twin)
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            shared = name in ("_packers", "_network", "instructions", "linear_instructions")
            twin.__dict__[name] = value if shared else copy.deepcopy(value, memo)
        return twin

    def __reduce__(self) -> Any:
        raise TypeError("an optimised model cannot be pickled; send the model, and optimise it where it is used")

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, h, w, num_features), before norm and pooling."""
        return self._maps(x, [self._stages - 1])[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, h, w, num_features) -> (B, num_classes); with `pre_logits` the pooled features (B, num_features)."""
        with torch.autocast(x.device.type, enabled=False), one_thread_after_fork():
            return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As SSMamba.forward_intermediates."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f'output_fmt is {output_fmt!r}, expected "NCHW" or "NHWC"')
        take, last = feature_take_indices(self._stages, indices)
        final = last if stop_early else self._stages - 1
        maps = dict(zip(sorted({*take, final}), self._maps(x, sorted({*take, final}))))
        found = [maps[i] for i in sorted(set(take))]
        if output_fmt == "NCHW":
            found = [x.permute(0, 3, 1, 2).contiguous() for x in found]
        return found if intermediates_only else (maps[final], found)

    def get_classifier(self) -> nn.Module:
        """The classifier, an identity where there is none."""
        return self.head.fc

    def _maps(self, x: Tensor, wanted: list[int]) -> list[Tensor]:
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape[1:]:
            raise ValueError(
                f"images have shape {tuple(x.shape)}, expected (B, {self.in_chans}, H, W), H and W at least 1"
            )
        if x.device.type != "cpu" or not x.is_floating_point():
            raise ValueError(f"images are {x.dtype} on {x.device}, expected floating point numbers on the CPU")
        if (torch.is_grad_enabled() and x.requires_grad) or has_tangents(x):
            raise RuntimeError(
                "an optimised model has no gradients; use torch.no_grad() or inference_mode(), or the model itself"
            )
        if torch.jit.is_tracing() or type(torch.empty(0, device="cpu")) is not Tensor:
            raise RuntimeError("an optimised model cannot be traced or exported; do so with the model it was made of")
        x = x.clone() if x._is_zerotensor() else x  # has no memory
        return plan.run_network(
            self._network,
            self.instructions,
            self.linear_instructions,
            self._map_dtype,
            x.detach().resolve_neg().float(),
            wanted,
            self.memory,
        )


# What products of a precision may multiply.
_PRODUCTS = {"float32": ("float32",), "bfloat16": ("float32", "bfloat16"), "int8": ("int8",)}


def _choose(precision: str, name: str | None) -> plan.InstructionSet:
    usable = plan.usable_instruction_sets(_PRODUCTS[precision])
    if not usable:
        known = ", ".join(s.name for s in plan.instruction_sets() if s.products == precision)
        raise ValueError(
            f"this CPU, or its system, has no {precision} products (it would need one of {known or 'an x86 CPU'}); "
            'use precision "bfloat16" or "float32"'
        )
    if name is None:
        return usable[-1]
    for instructions in usable:
        if instructions.name == name:
            return instructions
    raise ValueError(
        f"this CPU cannot run instructions {name!r}; it runs {', '.join(s.name for s in usable)} in {precision}"
    )
