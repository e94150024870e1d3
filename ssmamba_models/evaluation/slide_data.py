"""What an evaluation of slide vectors compares: vectors and their baselines, on the slides that all of them have."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssmamba_models.data.labelled import LabelledTiles
from ssmamba_models.data.slide_labels import check_slide_labels, match_slides, read_slide_labels, some_names
from ssmamba_models.data.slide_vectors import SlideVectors


@dataclass(frozen=True)
class VectorSet:
    """Vectors of the slides of an evaluation.

    Attributes:
        label: what the report calls them.
        vectors: (N, E), each of length 1.
        file: where they come from.
        baseline: whether they are there to be compared with.
        attributes: the provenance.
    """

    label: str
    vectors: np.ndarray
    file: str
    baseline: bool
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class LabelledSlides:
    """The slides of an evaluation.

    Attributes:
        table: names, labels, patients (None where the labels have none) and splits.
        sets: the vectors, those asked for first.
        unlabelled: slides with a vector and no label.
        missing: slides with a label and no vector in one file or more, where that was allowed.
    """

    table: LabelledTiles
    sets: tuple[VectorSet, ...]
    unlabelled: tuple[str, ...]
    missing: tuple[str, ...]


def label_slides(
    files: Mapping[str, tuple[str, SlideVectors]], labels: str | os.PathLike, *, skip_missing: bool = False
) -> LabelledSlides:
    """Bring vectors and labels together.

    Args:
        files: label -> the file and its vectors.
        labels: CSV, as `read_slide_labels`.
        skip_missing: leave out slides of the table without a vector in every file, instead of refusing.

    Raises:
        FileNotFoundError, ValueError: as `read_slide_labels`; a slide of the table has no vector, a slide stands there
            twice, there is one class, or a patient is in two splits.
    """
    rows = read_slide_labels(labels)
    known = set.union(*(set(vectors.slides) for _, vectors in files.values()))
    everywhere = set.intersection(*(set(vectors.slides) for _, vectors in files.values()))
    found, missing = match_slides(rows, known, labels)
    missing += tuple(sorted(set(found) - everywhere))
    found = {slide: facts for slide, facts in sorted(found.items()) if slide in everywhere}
    if missing and (not skip_missing or not found):
        where = ", ".join(repr(file) for file, _ in files.values())
        raise ValueError(
            f"{len(missing)} of the {len(rows)} slides in {os.fspath(labels)!r} have no vector in {where} "
            f"({some_names(missing)}); embed them, take them out of the table, or leave them out with --skip-missing"
        )
    check_slide_labels(found, labels)
    unlabelled = tuple(sorted(known - set(found) - set(missing)))
    return LabelledSlides(_table(found, rows, labels), _sets(files, list(found)), unlabelled, missing)


def _table(
    found: Mapping[str, Mapping[str, str | None]], rows: Sequence[Mapping[str, str]], labels: str | os.PathLike
) -> LabelledTiles:
    columns = {key: tuple(facts[key] for facts in found.values()) for key in ("label", "patient", "split")}
    groups = columns["patient"] if "patient" in rows[0] else None
    splits = columns["split"] if "split" in rows[0] else None
    return LabelledTiles(Path(labels), tuple(found), columns["label"], groups, splits)


def _sets(files: Mapping[str, tuple[str, SlideVectors]], slides: list[str]) -> tuple[VectorSet, ...]:
    asked, baselines = [], []
    for label, (file, vectors) in files.items():
        place = {slide: number for number, slide in enumerate(vectors.slides)}
        rows = [place[slide] for slide in slides]
        asked.append(VectorSet(label, _unit(vectors.embeddings[rows]), file, False, vectors.attributes))
        for name, values in sorted(vectors.baselines.items()):
            baselines.append((label, VectorSet(name, _unit(values[rows]), file, True, vectors.attributes)))
    return (*asked, *_distinct(baselines, files))


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


def _distinct(baselines: list[tuple[str, VectorSet]], taken: Iterable[str]) -> list[VectorSet]:
    """A baseline that several files share stands once; one whose name is not its own alone says whose it is."""
    kept: list[tuple[str, VectorSet]] = []
    for whose, one in baselines:
        if not any(one.label == other.label and np.array_equal(one.vectors, other.vectors) for _, other in kept):
            kept.append((whose, one))
    names = [one.label for _, one in kept] + list(taken)
    return [
        one if names.count(one.label) == 1 else replace(one, label=f"{one.label} ({whose})") for whose, one in kept
    ]
