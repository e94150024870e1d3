"""How an evaluation is done, whatever the models and the tiles."""

from __future__ import annotations

from dataclasses import dataclass

from ssmamba_models.evaluation.few_shot import EPISODES
from ssmamba_models.evaluation.knn import NEIGHBOURS


@dataclass(frozen=True)
class Settings:
    """The numbers of an evaluation.

    Attributes:
        folds: group-wise folds, where the tiles have no splits.
        seeds: how often what is random is drawn: training groups or folds, few-shot episodes, random weights, and
            which of a model's several trainings is taken.
        neighbours: k of kNN.
        episodes: few-shot episodes for each seed and number of shots.
        draws: bootstrap draws.
        magnification: whether to compare tiles with themselves at half resolution.
    """

    folds: int = 5
    seeds: int = 3
    neighbours: int = NEIGHBOURS
    episodes: int = EPISODES
    draws: int = 1000
    magnification: bool = False

    def __post_init__(self) -> None:
        for name, least in (("folds", 2), ("seeds", 1), ("neighbours", 1), ("episodes", 1), ("draws", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")
