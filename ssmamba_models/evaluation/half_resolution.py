"""The magnification part of an evaluation: features at half the input size, and their scores per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssmamba_models.data.labelled import LabelledTiles
from ssmamba_models.evaluation.bootstrap import Estimate, Resampling
from ssmamba_models.evaluation.embedding import Embedding, shared_places
from ssmamba_models.evaluation.magnification import score_magnification, spread_places
from ssmamba_models.evaluation.model_choice import ModelChoice
from ssmamba_models.evaluation.scoring import TaskData
from ssmamba_models.evaluation.settings import Settings
from ssmamba_models.evaluation.tile_features import FeatureTable

Magnification = dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class _HalfFeatures:
    """Which tiles (places, rising) were seen at half resolution, and for each encoder and seed their features."""

    places: np.ndarray
    features: dict[str, list[np.ndarray]]


def score_half_resolution(
    tiles: LabelledTiles,
    tasks: Sequence[TaskData],
    models: Mapping[str, tuple[ModelChoice, Sequence[FeatureTable], Sequence[np.ndarray]]],
    folder: Path,
    settings: Settings,
    embedding: Embedding,
) -> tuple[list[dict[str, Magnification]], list[str]]:
    """Compare the scored tiles of each task with themselves at half resolution.

    Args:
        tiles: the N tiles that every encoder could read.
        tasks: the tasks over them.
        models: label -> choice, and for each seed its table and its (N, D) features at full resolution.
        folder: where feature files are kept; it exists.
        settings, embedding: how.

    Returns:
        For each task, label -> scores (see `score_magnification`); and notes on encoders that are left out, because
        they cannot take half their input size, or have other random weights there.
    """
    chosen = [spread_places(task.protocol.test) for task in tasks]
    wanted = np.unique(np.concatenate(chosen))
    subset = tiles.subset(wanted)
    tables, notes = {}, []
    for label, (choice, full, _) in models.items():
        half = _half_tables(subset, choice, full, folder, settings, embedding)
        if isinstance(half, str):
            notes.append(f"magnification leaves out {label}: {half}")
        else:
            tables[label] = half
    if not tables:
        return [{} for _ in tasks], notes
    shared = shared_places(list(tables.values()))
    halves = _HalfFeatures(
        wanted[shared], {label: [table.rows(shared) for table in seeds] for label, seeds in tables.items()}
    )
    whole = {label: features for label, (_, _, features) in models.items()}
    scores = [_score_task(task, places, halves, whole, settings) for task, places in zip(tasks, chosen)]
    return scores, notes


def _half_tables(
    tiles: LabelledTiles,
    choice: ModelChoice,
    full: Sequence[FeatureTable],
    folder: Path,
    settings: Settings,
    embedding: Embedding,
) -> list[FeatureTable] | str:
    size = int(full[0].provenance["input_size"][-1]) // 2
    try:
        embedding.load(choice, 0, size)
    except ValueError as error:
        return str(error)
    tables = embedding.tables(tiles, choice, settings.seeds, folder, ".half", size)
    # A position table has other random numbers at another size; published ones are resampled, which is their purpose.
    if choice.varies and any(_weights(half) != _weights(whole) for half, whole in zip(tables, full)):
        return "its random weights are others at half the input size"
    return tables


def _weights(table: FeatureTable) -> str:
    return table.provenance["weights_sha256"]


def _score_task(
    task: TaskData,
    places: np.ndarray,
    halves: _HalfFeatures,
    full: Mapping[str, Sequence[np.ndarray]],
    settings: Settings,
) -> dict[str, Magnification]:
    places = np.intersect1d(places, halves.places)
    rows = np.searchsorted(halves.places, places)
    units, labels = task.units[places], task.labels[places]
    resampling = Resampling(units, labels, settings.seeds, settings.draws)
    return {
        label: score_magnification(
            [features[places] for features in full[label]], [features[rows] for features in seeds], units, resampling
        )
        for label, seeds in halves.features.items()
    }
