"""Which encoders are compared: a name, where its weights come from, and what the report calls it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.models import get_pretrained_cfg, is_model

from ssmamba_models.engine.encoder import Encoder, load_encoder
from ssmamba_models.evaluation.color_histogram import COLOR_HISTOGRAM, color_histogram_encoder
from ssmamba_models.zoo import list_models

PRETRAINED, RANDOM = "pretrained", "none"
_LABEL = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class ModelChoice:
    """An encoder to score.

    Attributes:
        label: what the report and the files call it.
        name: a timm name, or "color_histogram".
        init: "pretrained" (published weights), "none" (random weights), or the path of a weight file or run folder;
            several of those, with commas between, are trainings that differ in their seed.
    """

    label: str
    name: str
    init: str

    @property
    def runs(self) -> tuple[str, ...]:
        """The parts of `init`: one for all seeds, or one for each."""
        # A path of that name may hold commas itself.
        return (self.init,) if os.path.exists(self.init) else tuple(self.init.split(","))

    @property
    def varies(self) -> bool:
        """Whether the weights differ from seed to seed."""
        return self.name != COLOR_HISTOGRAM and (self.init == RANDOM or len(self.runs) > 1)

    def check_seeds(self, seeds: int) -> None:
        """See that there are as many trainings as seeds, or one (ValueError: there are not)."""
        count = len(self.runs)
        if count not in (1, seeds):
            raise ValueError(
                f"the model {self.label!r} names {count} trainings ({self.init}) for {seeds} seeds; use "
                f"--seeds {count}, or name one training or {seeds}"
            )

    def load(
        self,
        seed: int = 0,
        img_size: int | None = None,
        device: torch.device | str | None = None,
        precision: str = "fp32",
        pool: str = "model",
    ) -> Encoder:
        """Make the encoder; `seed` matters for random weights and several trainings, `pool` not for the histogram.

        Raises:
            ValueError, OSError: as `load_encoder`.
        """
        if self.name == COLOR_HISTOGRAM:
            return color_histogram_encoder(img_size)
        self._check_published()
        init = self.runs[seed] if len(self.runs) > 1 else self.init
        pretrained = init == PRETRAINED
        checkpoint = None if init in (PRETRAINED, RANDOM) else init
        return load_encoder(
            self.name,
            pretrained=pretrained,
            checkpoint=checkpoint,
            device=device,
            precision=precision,
            img_size=img_size,
            seed=seed,
            pool=pool,
        )

    def _check_published(self) -> None:
        # load_encoder would advise options that `ssmamba evaluate` does not have.
        if self.init != PRETRAINED or ":" in self.name or not is_model(self.name.split(".")[0]):
            return
        try:
            config = get_pretrained_cfg(self.name)
        except RuntimeError:  # an unknown tag: load_encoder names the known ones
            return
        if config is None or not config.has_weights:
            raise ValueError(
                f"{self.name} has no published weights; of this package, {', '.join(list_models(pretrained=True))} "
                f"have; write {self.name}@RUN (a run folder or weight file), or {self.name}@none for random weights"
            )


def parse_model(text: str, init: str = PRETRAINED) -> ModelChoice:
    """Read `[LABEL=]NAME[@INIT]`, as `--model` takes it.

    Args:
        text: for example "ssmamba_tiny", "mamim=ssmamba_tiny@runs/mamim", "ssmamba_tiny@none" or
            "hf-hub:owner/name" (which takes no @INIT). "mamim=ssmamba_tiny@run0,run1,run2" are
            three trainings, one for each seed.
        init: what INIT is where the text names none; the path of weights does not concern names with a place.

    Raises:
        ValueError: not of that form, or several trainings of which one is empty, "pretrained" or "none".
    """
    label, name, own = _split(text)
    if not name or own == "" or label == "" or (label and not _LABEL.fullmatch(label)):
        raise ValueError(
            f"the model {text!r} is not of the form [LABEL=]NAME[@INIT], such as mamim=ssmamba_tiny@runs/mamim; a "
            "label has letters, digits and . _ + -"
        )
    place = ":" in name
    if place and init not in (PRETRAINED, RANDOM):
        init = PRETRAINED  # those of a run are for the names beside it
    choice = ModelChoice(label or _default_label(name, own), name, own or init)
    if any(not run.strip() for run in choice.runs):
        raise ValueError(f"the model {text!r} has an empty place between commas; expected a training in each")
    if len(choice.runs) > 1 and {PRETRAINED, RANDOM} & set(choice.runs):
        raise ValueError(
            f"the model {text!r} has {PRETRAINED} or {RANDOM} among several trainings; expected run folders or weight "
            f"files alone, or {PRETRAINED} or {RANDOM} alone"
        )
    return choice


def _split(text: str) -> tuple[str | None, str, str | None]:
    # A path after @ may hold =, and hf-hub's names may hold @revision.
    head, at, init = text.partition("@")
    before, equals, after = head.partition("=")
    label, name = (before, after) if equals else (None, head)
    if ":" in before:  # a place, with = in its path
        return None, text, None
    if ":" in name:
        return label, name + at + init, None
    return label, name, init if at else None


def _default_label(name: str, init: str | None) -> str:
    # Of several trainings the first names them.
    text = name if init is None else f"{name}-{init.split(',')[0].rstrip('/').split('/')[-1]}"
    return re.sub(r"[^\w.+-]+", "_", text)


def parse_models(texts: Sequence[str], init: str = PRETRAINED) -> tuple[ModelChoice, ...]:
    """Read several; their labels must differ.

    Raises:
        ValueError: none is given, one is not of the form, or two have one label.
    """
    if not texts:
        raise ValueError("no model is named; give one or more, such as --model ssmamba_tiny@none")
    choices = tuple(parse_model(text, init) for text in texts)
    labels = [choice.label for choice in choices]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two models are called {label!r}; put names before them, such as first={label}")
    return choices
