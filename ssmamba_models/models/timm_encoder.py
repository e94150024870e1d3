"""timm's interface for a hierarchical encoder: what its training, feature and fine-tuning code asks of a model."""

# No `from __future__ import annotations`: TorchScript reads the annotations of methods, see ssmamba.py.
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Mlp, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ssmamba_models.models import arguments


class TimmEncoder(nn.Module):
    """An encoder of channels-last stages: `stem`, `stages` (nn.Sequential) and `head`, which the subclass builds.

    It also sets `num_classes`, `num_features`, `head_hidden_size` and `feature_info`, one entry per stage.
    """

    output_fmt = "NHWC"

    if TYPE_CHECKING:
        stem: nn.Module
        stages: Any
        head: Any
        num_classes: int
        num_features: int
        head_hidden_size: int
        feature_info: list[dict[str, Any]]

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter, as after `to_empty` of a model built on the meta device.

        The same seed gives the same weights as building the model does.

        Args:
            needs_reset: also the layers that initialise themselves when they are built.

        Example::

            model = timm.create_model("ssmamba_small", device="meta").to_empty(device="cuda")
            model.init_weights()
        """
        if needs_reset:
            self.apply(_reset)  # children first, in the order in which they were built
        for module in self.modules():
            if isinstance(module, Mlp):
                _init_linear(module.fc1)
                _init_linear(module.fc2)
        _init_linear(self.head.fc)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters of the recurrence: decay would pull time scales and skips towards arbitrary values."""
        names = ("dt_bias", "A_log", "B_bias", "D")
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in names}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rate decay: the stem, then every block (coarse: every stage)."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stem",
            "blocks": [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Does nothing but check its arguments: any image size works without a change of the model.

        Args:
            img_size: pixels, int or (height, width).
            patch_size: must be None: there are no patches.

        Raises:
            ValueError: a size that is not positive, or a patch_size.
        """
        arguments.check_input_size(img_size, patch_size)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier, an identity where there is none."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Give the model another classifier (0: none) and, if given, another pooling.

        Args:
            num_classes: classes, 0 for none.
            global_pool: pooling, None for the present one.
            reset_other: drop the norm between pooling and classifier.

        Raises:
            ValueError: a negative number of classes or an unknown pooling; the model is left as it was.
        """
        arguments.check_classes(num_classes)
        weight = next(self.stem.parameters())
        self.head.reset(
            num_classes, global_pool, reset_other, self.num_features, device=weight.device, dtype=weight.dtype
        )
        _init_linear(self.head.fc)
        self.num_classes, self.head_hidden_size = num_classes, self.head.num_features

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of several stages in one pass.

        Args:
            x: (B, in_chans, H, W).
            indices: the last n stages if an int, all if None, else the stages with these indices.
            norm: ignored, as stages end without a norm; kept for timm's interface.
            stop_early: do not compute stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: do not return the final map.

        Returns:
            The final map (B, h, w, num_features) and the intermediates, or the intermediates alone.

        Raises:
            ValueError: output_fmt is neither.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f'output_fmt is {output_fmt!r}, expected "NCHW" or "NHWC"')
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > last:
                break
            x = stage(x)
            if i in take:
                intermediates.append(x.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one in `indices`, and the head (always, if stages were dropped: it fits the
        last stage alone). Returns the indices taken."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        mode = self.stages.training  # which a slice, a new container, forgets
        self.stages = self.stages[: last + 1]
        self.stages.training = mode
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "", reset_other=True)
        return take


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()


def _init_linear(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
