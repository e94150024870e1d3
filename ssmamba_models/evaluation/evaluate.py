"""Score encoders on labelled tiles: features once, then probes, comparisons, a report and pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssmamba_models.data.hdf5 import require_h5py
from ssmamba_models.data.labelled import LabelledTiles, read_tiles
from ssmamba_models.evaluation.embedding import Embedding, shared_places
from ssmamba_models.evaluation.folds import make_protocol
from ssmamba_models.evaluation.half_resolution import score_half_resolution
from ssmamba_models.evaluation.markdown import as_markdown
from ssmamba_models.evaluation.model_choice import ModelChoice
from ssmamba_models.evaluation.pictures import draw_pictures
from ssmamba_models.evaluation.report import Evaluated, make_report, write_json
from ssmamba_models.evaluation.report_folder import FEATURES, MARKDOWN, PLOTS, REPORT, check_report_folder, whole_report
from ssmamba_models.evaluation.scoring import TaskData, score_encoder
from ssmamba_models.evaluation.settings import Settings
from ssmamba_models.evaluation.tasks import Task, choose_tasks
from ssmamba_models.threads import threaded


@threaded
def evaluate(
    data: str | os.PathLike,
    models: Sequence[ModelChoice],
    out: str | os.PathLike,
    *,
    tasks: Sequence[Task] = (),
    settings: Settings | None = None,
    embedding: Embedding | None = None,
    overwrite: bool = False,
) -> dict:
    """Score encoders on labelled tiles and write a report.

    Args:
        data: the folder of tiles, see `ssmamba_models.data.labelled.read_tiles`.
        models: the encoders, see `parse_models`.
        out: folder for report.json, report.md, plots/ and features/. The report is written whole or not at all;
            features are kept as soon as they are done, and used again by the next run with the same tiles and weights.
        tasks: what to tell apart; empty: all classes.
        settings: folds, seeds, draws.
        embedding: input size, device, batch size.
        overwrite: replace an existing report.

    Returns:
        What is in report.json.

    Raises:
        ValueError: labels missing, one class, unknown classes or models, too few groups, features that are not finite.
        FileExistsError: `out` holds a report and `overwrite` is False.
        OSError: the tiles, weights or output are not usable.
        ImportError: scikit-learn, matplotlib or h5py is missing.
    """
    settings, embedding = settings or Settings(), embedding or Embedding()
    require_evaluation_packages()
    folder = check_report_folder(out, overwrite)
    tiles, tasks = _read_tasks(data, tasks, settings)
    for choice in models:  # an impossible one is found before hours go into the others
        choice.check_seeds(settings.seeds)
        for seed in range(len(choice.runs)):
            embedding.load(choice, seed)
    (folder / FEATURES).mkdir(parents=True, exist_ok=True)
    evaluated = _score(tiles, models, tasks, folder, settings, embedding)
    report = make_report(evaluated)
    with whole_report(folder) as part:
        report["plots"] = draw_pictures(part / PLOTS, evaluated)
        (part / MARKDOWN).write_text(as_markdown(report), encoding="utf-8")
        write_json(part / REPORT, report)
    return report


def require_evaluation_packages() -> None:
    """Import what only evaluation needs.

    Raises:
        ImportError: a package is missing; the message names the extra that installs it.
    """
    require_h5py()
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"evaluation needs scikit-learn and matplotlib ({error}); install them with: "
            'pip install "ssmamba-models[eval]"'
        ) from error


def _read_tasks(
    data: str | os.PathLike, tasks: Sequence[Task], settings: Settings
) -> tuple[LabelledTiles, tuple[Task, ...]]:
    """The tiles of all tasks, and the tasks; what cannot be scored is an error now."""
    tiles = read_tiles(data)
    tasks = choose_tasks(tiles, tasks)
    for task in tasks:
        make_protocol(tiles, task, settings.folds, settings.seeds)
    return tiles.select(classes=sorted({name for task in tasks for name in task.classes})), tasks


def _score(
    tiles: LabelledTiles,
    models: Sequence[ModelChoice],
    tasks: Sequence[Task],
    folder: Path,
    settings: Settings,
    embedding: Embedding,
) -> Evaluated:
    tables = {choice.label: embedding.tables(tiles, choice, settings.seeds, folder / FEATURES) for choice in models}
    shared = shared_places(list(tables.values()))
    readable = tiles.subset(shared)
    features = {label: [table.rows(shared) for table in seeds] for label, seeds in tables.items()}
    data = [TaskData(readable, task, settings) for task in tasks]
    scores = [{label: score_encoder(task, rows, settings) for label, rows in features.items()} for task in data]
    notes: list[str] = []
    if settings.magnification:
        known = {choice.label: (choice, tables[choice.label], features[choice.label]) for choice in models}
        halves, notes = score_half_resolution(readable, data, known, folder / FEATURES, settings, embedding)
        scores = [
            {label: replace(entry, magnification=half.get(label)) for label, entry in scored.items()}
            for scored, half in zip(scores, halves)
        ]
    return Evaluated(tiles, readable, tuple(models), tables, features, data, scores, settings, notes)
