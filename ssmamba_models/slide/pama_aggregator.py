"""PAMA as an aggregator: fine-tuned by `ssmamba mil train`, from random weights or pretrained ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmamba_models.slide.pama import PAMA
from ssmamba_models.slide.pama_heads import PamaClassifier
from ssmamba_models.slide.slide_encoders import create_slide_encoder
from ssmamba_models.slide.slide_weights import read_slide_config


class PamaAggregator(PamaClassifier):
    """A PAMA encoder and a linear classifier, trained together; see `PamaClassifier`, also for the "attention".

    Args:
        feature_dim: D.
        num_classes: number of classes.
        model: a PAMA of `list_slide_encoders()`; None takes that of `init`, or pama_small.
        init: where the encoder's weights come from: a run folder of `ssmamba slide-pretrain --method pama`, a published
            one, or "hf-hub:ORG/NAME"; None has random ones.
        model_args: further arguments of `create_slide_encoder`.
        dropout: share of the slide's vector dropped in training.

    Raises:
        ValueError, OSError: as `create_slide_encoder`; the encoder is no PAMA.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        model: str | None = None,
        init: str | None = None,
        model_args: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        if model_args is not None and not isinstance(model_args, Mapping):
            raise ValueError(f"model_args are {model_args!r}, expected names and values")
        # YAML takes a folder that is called 3 for a number.
        init = None if init is None else str(init)
        if model is None:
            model = "pama_small" if init is None else read_slide_config(init)["architecture"]
        encoder = create_slide_encoder(model, feature_dim, False if init is None else init, **(model_args or {}))
        if not isinstance(encoder, PAMA):
            raise ValueError(f"{model!r} is no PAMA; 'pama' takes one, such as pama_small")
        super().__init__(encoder, num_classes, dropout)

    def rebuild_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Name and arguments of the encoder in the place of `init`: that folder may be gone when it is loaded."""
        arguments = {name: value for name, value in self.encoder.arguments.items() if name != "feature_dim"}
        kept = {name: value for name, value in given.items() if name != "init"}
        return {**kept, "model": self.encoder.name, "model_args": arguments}
