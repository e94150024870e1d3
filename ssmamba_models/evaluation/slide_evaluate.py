"""Score slide vectors on labelled slides: from few labels and from many, beside their baselines, with a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssmamba_models.data.slide_vectors import SlideVectors, read_slide_vectors
from ssmamba_models.engine.slide_embed import embed_baselines
from ssmamba_models.evaluation.evaluate import require_evaluation_packages
from ssmamba_models.evaluation.plots import MOST_POINTS, draw_learning_curves, draw_projections, project
from ssmamba_models.evaluation.report import write_json
from ssmamba_models.evaluation.report_folder import MARKDOWN, PLOTS, REPORT, check_report_folder, whole_report
from ssmamba_models.evaluation.slide_data import LabelledSlides, label_slides
from ssmamba_models.evaluation.slide_markdown import slide_markdown
from ssmamba_models.evaluation.slide_report import make_slide_report
from ssmamba_models.evaluation.slide_scoring import SlideSettings, SlideTask, score_vectors
from ssmamba_models.threads import threaded


@threaded
def evaluate_slides(
    embeddings: Mapping[str, str | os.PathLike],
    labels: str | os.PathLike,
    out: str | os.PathLike,
    *,
    ids: str | os.PathLike | None = None,
    features: str | os.PathLike | None = None,
    settings: SlideSettings | None = None,
    skip_missing: bool = False,
    plots: bool = True,
    threads: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score slide vectors and write a report.

    Logistic regression and kNN on vectors of length 1, learned from several numbers of slides, on folds that divide no
    patient; AUC, macro-F1, balanced accuracy and accuracy with intervals of a bootstrap over patients. The baselines
    that a file of `ssmamba slide-embed` holds (mean of the tiles, random encoder) are always scored beside it.

    Args:
        embeddings: label -> file of `ssmamba slide-embed`, or .npy.
        labels: CSV with the columns slide and label and, each optional, patient (or group) and split.
        out: folder for report.json, report.md and plots/, written whole or not at all.
        ids: the names of the rows of .npy files.
        features: folder of feature files, from which baselines are made for files that hold none.
        settings: folds, repetitions, numbers of training slides.
        skip_missing: leave out labelled slides without a vector, instead of refusing.
        plots: draw learning curves and the vectors in two dimensions.
        threads: CPU threads; None takes the cores that this process may use (see `threads.use_threads`).
        overwrite: replace an existing report.

    Returns:
        What is in report.json.

    Raises:
        ValueError: no embeddings, ids without a .npy file, or files, labels or folds do not fit (see
            `read_slide_vectors`, `label_slides`, `make_protocol`).
        FileNotFoundError, FileExistsError, OSError: something to read is not there, or `out` cannot be written.
        ImportError: scikit-learn, matplotlib or h5py is missing.
    """
    if not embeddings:
        raise ValueError("no embeddings are named; give one file or more")
    if ids is not None and not any(map(_is_npy, embeddings.values())):
        raise ValueError("--ids (ids=...) names the rows of .npy files, and no embeddings are one; leave it out")
    settings = settings or SlideSettings()
    require_evaluation_packages()
    folder = check_report_folder(out, overwrite)
    files = {label: (os.fspath(path), _read(path, ids)) for label, path in embeddings.items()}
    notes: list[str] = []
    if features is not None:
        files, notes = _with_baselines(files, features)
    slides = label_slides(files, labels, skip_missing=skip_missing)
    task = SlideTask(slides, settings)
    scores = {one.label: score_vectors(task, one.vectors) for one in slides.sets}
    report = make_slide_report(slides, task, scores, notes)
    folder.mkdir(exist_ok=True)
    with whole_report(folder) as part:
        if plots:
            report["plots"] = _draw(part / PLOTS, slides, task, report)
        (part / MARKDOWN).write_text(slide_markdown(report), encoding="utf-8")
        write_json(part / REPORT, report)
    return report


def _read(path: str | os.PathLike, ids: str | os.PathLike | None) -> SlideVectors:
    return read_slide_vectors(path, ids if _is_npy(path) else None)


def _is_npy(path: str | os.PathLike) -> bool:
    return Path(path).suffix.lower() == ".npy"


def _with_baselines(
    files: Mapping[str, tuple[str, SlideVectors]], features: str | os.PathLike
) -> tuple[dict[str, tuple[str, SlideVectors]], list[str]]:
    """The files with baselines, made from feature files for those that have none; and what a reader should know."""
    bare = {label for label, (_, vectors) in files.items() if not vectors.baselines}
    if not bare:
        return dict(files), []
    made, encoder = embed_baselines(features)
    place = {slide: number for number, slide in enumerate(made.slides)}
    completed = dict(files)
    for label in bare:
        file, vectors = files[label]
        unknown = [slide for slide in vectors.slides if slide not in place]
        if unknown:
            raise ValueError(
                f"{len(unknown)} slides of {file!r} have no readable feature file in {os.fspath(features)!r} (first: "
                f"{unknown[0]!r}), so they have no baseline; give the folder that the vectors were made from, or no "
                "--features"
            )
        rows = [place[slide] for slide in vectors.slides]
        baselines = {name: values[rows] for name, values in made.baselines.items()}
        completed[label] = file, SlideVectors(vectors.slides, vectors.embeddings, baselines, vectors.attributes)
    return completed, [f"the random encoder beside {', '.join(sorted(bare))} is {encoder}"]


def _draw(folder: Path, slides: LabelledSlides, task: SlideTask, report: Mapping[str, Any]) -> list[dict[str, str]]:
    curves = {label: _curve(entries) for label, entries in report["results"].items()}
    drawn = [{"file": "learning_curve.png", "kind": "learning_curve"}, {"file": "map.png", "kind": "map"}]
    draw_learning_curves(folder / "learning_curve.png", curves, "AUC", "Logistic regression on slide vectors")
    places = np.sort(np.random.default_rng(0).permutation(len(slides.table))[:MOST_POINTS])
    points = {one.label: project(one.vectors[places]) for one in slides.sets}
    draw_projections(folder / "map.png", points, task.labels[places], task.task.classes, "Slide vectors (t-SNE)")
    return drawn


def _curve(entries: Sequence[Mapping[str, Any]]) -> list[tuple[float, Mapping[str, float]]]:
    points = [
        (sum(entry["train_slides"]) / 2, entry["metrics"]["auc"])
        for entry in entries
        if entry["method"] == "logistic_regression" and entry["metrics"]["auc"]["value"] is not None
    ]
    return sorted(points, key=lambda point: point[0])
