"""report.md: what a person reads of a report, made from report.json's content alone."""

from __future__ import annotations

from collections.abc import Sequence

from ssmamba_models.evaluation.markdown_table import markdown_table
from ssmamba_models.evaluation.report_folder import PLOTS

_METHODS = {"linear_probe": "linear probe", "knn": "kNN", "prototypes": "prototypes"}
_METRICS = {"macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy", "auc": "AUC"}
_RANKS = frozenset({"mean_rank", "median_rank"})


def as_markdown(report: dict) -> str:
    """Write a report for a person.

    Args:
        report: what `make_report` gives, with `plots`.

    Returns:
        Markdown; every figure in it is a figure of the report, rounded.
    """
    parts = ["# Evaluation of tile encoders", _opening(report), "## Encoders", _models(report)]
    for task in report["tasks"]:
        parts += _task(task, report)
    parts += ["## How to read this", _how_to_read(report), "## Limits", _limits(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _figure(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}"


def _estimate(estimate: dict, digits: int = 3) -> str:
    low, high = _figure(estimate["low"], digits), _figure(estimate["high"], digits)
    return f"{_figure(estimate['value'], digits)} ({low} to {high})"


def _opening(report: dict) -> str:
    data = report["data"]
    groups = f" of {data['groups']} groups" if data["groups"] is not None else ""
    lines = [f"{data['readable']} tiles{groups} in `{data['folder']}` (list of tiles: sha256 `{data['sha256'][:12]}`)."]
    if data["unreadable"]:
        lines.append(f"\n{len(data['unreadable'])} of {data['tiles']} tiles are unreadable and left out:\n")
        lines += [f"- `{entry['path']}`: {entry['reason']}" for entry in data["unreadable"][:20]]
        if len(data["unreadable"]) > 20:
            lines.append(f"- and {len(data['unreadable']) - 20} more, see report.json")
    return "\n".join(lines)


def _features(entry: dict) -> str:
    pool = entry["provenance"][0].get("pool")
    return f"{entry['embed_dim']} ({pool})" if pool else str(entry["embed_dim"])


def _models(report: dict) -> str:
    rows = [
        (
            entry["label"],
            f"`{entry['model']}`",
            _weights(entry),
            f"{entry['provenance'][0]['input_size'][-1]} px",
            _features(entry),
            ", ".join(f"`{sha[:12]}`" for sha in entry["weights_sha256"]),
        )
        for entry in report["models"]
    ]
    return markdown_table(("encoder", "model", "weights", "input", "features", "sha256 of the weights"), rows)


def _weights(entry: dict) -> str:
    provenance = entry["provenance"][0]
    kinds = {"random": "random", "none": "none", "pretrained": f"published ({provenance['pretrained_tag']})"}
    return kinds.get(provenance["weights"], f"`{entry['init']}`")


def _task(task: dict, report: dict) -> list[str]:
    labels = list(task["results"])
    return [
        f"## Task {task['name']}: {', '.join(task['classes'])}",
        _protocol(task, report["data"]["groups"] is not None),
        "### Scores",
        _scores(task, labels),
        _method_notes(task, labels),
        *_comparisons(task),
        "### Few shots",
        "Macro-F1 from K tiles per class, of K different groups; in brackets the 95 % interval.",
        _few_shots(task, labels),
        *_magnification(task, labels),
        "### Classes (linear probe)",
        _classes(task, labels),
        *_pictures(task, report),
    ]


def _protocol(task: dict, grouped: bool) -> str:
    protocol = task["protocol"]
    train = [count for seed in protocol["train_tiles"] for count in seed]
    learned = f"{min(train)} to {max(train)}" if min(train) < max(train) else str(train[0])
    groups = f" of {protocol['test_groups']} groups" if grouped else ""
    scored = f"{protocol['test_tiles']} tiles{groups}"
    if protocol["kind"] == "split":
        split = protocol["test_split"]
        return f"Learned from {learned} tiles of the split train; scored on {scored} of the split {split}."
    return f"{protocol['folds']} group-wise folds: {scored}, each scored once, learned from {learned} others."


def _scores(task: dict, labels: Sequence[str]) -> str:
    rows = [
        (label, _METHODS[method], *(_estimate(task["results"][label][method]["metrics"][name]) for name in _METRICS))
        for method in _METHODS
        for label in labels
    ]
    return markdown_table(("encoder", "method", *_METRICS.values()), rows)


def _method_notes(task: dict, labels: Sequence[str]) -> str:
    return "\n".join(
        f"- {label}, {_METHODS[method]}: {note}."
        for label in labels
        for method in _METHODS
        for note in task["results"][label][method]["notes"]
    )


def _comparisons(task: dict) -> list[str]:
    if not task["comparisons"]:
        return []
    shown = [row for row in task["comparisons"] if _is_headline(row)]
    rows = [
        (
            f"{row['first']} - {row['second']}",
            _METHODS.get(row["method"], row["method"]),
            _METRICS.get(row["metric"], row["metric"].replace("_", " ")),
            f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})",
            f"{row['p']:.3f}",
        )
        for row in shown
    ]
    return [
        "### Comparisons",
        "On the same tiles, folds and bootstrap draws; all metrics are in report.json.",
        markdown_table(("encoders", "method", "metric", "difference", "p"), rows),
    ]


def _is_headline(row: dict) -> bool:
    if row["method"].startswith("magnification"):
        return row["metric"] in ("pair_cosine", "recall_at_1")
    return row["metric"] == "macro_f1" or (row["metric"] == "auc" and row["method"] == "linear_probe")


def _few_shots(task: dict, labels: Sequence[str]) -> str:
    shots = [entry["shots"] for entry in task["results"][labels[0]]["few_shot"]]
    rows = [
        (label, *(_estimate(entry["metrics"]["macro_f1"]) for entry in task["results"][label]["few_shot"]))
        for label in labels
    ]
    return markdown_table(("encoder", *(f"K = {count}" for count in shots)), rows)


def _magnification(task: dict, labels: Sequence[str]) -> list[str]:
    known = [label for label in labels if "magnification" in task["results"][label]]
    if not known:
        return []
    columns = {
        "pair_cosine": "cosine, same tile",
        "other_cosine": "cosine, other tiles",
        "median_rank": "median rank",
        "mean_rank": "mean rank",
        "recall_at_1": "recall@1",
        "recall_at_10": "recall@10",
    }
    rows = []
    for kind in ("plain", "centred"):
        for label in known:
            figures = task["results"][label]["magnification"][kind]
            cells = (_estimate(figures[name], 1 if name in _RANKS else 3) for name in columns)
            rows.append((label, kind, *cells))
    return [
        "### Magnification",
        "Each tile against itself and all tiles of other groups at half resolution. Centred: each resolution's mean "
        "taken out.",
        markdown_table(("encoder", "features", *columns.values()), rows),
    ]


def _classes(task: dict, labels: Sequence[str]) -> str:
    keys = ("precision", "recall", "f1", "auc")
    rows = [
        (label, row["class"], row["tiles"], row["groups"], *(_figure(row[key]) for key in keys))
        for label in labels
        for row in task["results"][label]["linear_probe"]["classes"]
    ]
    return markdown_table(("encoder", "class", "tiles", "groups", "precision", "recall", "F1", "AUC"), rows)


def _pictures(task: dict, report: dict) -> list[str]:
    pictures = [entry for entry in report["plots"] if entry["task"] == task["name"]]
    captions = [" ".join(filter(None, (entry["kind"], entry.get("label")))) for entry in pictures]
    return [f"![{caption}]({PLOTS}/{entry['file']})" for caption, entry in zip(captions, pictures)]


def _how_to_read(report: dict) -> str:
    settings = report["settings"]
    folds = any(task["protocol"]["kind"] == "folds" for task in report["tasks"])
    pooled = (
        "- With folds, AUC (of the classes and the ROC curves too) ranks the tiles of all folds at once: the folds' "
        "probes need not agree in scale, so the AUC within each fold may be higher."
    )
    return "\n".join(
        (
            "- Linear probe: logistic regression (L-BFGS) on standardised features, C = features x classes / 100.",
            f"- kNN: {settings['neighbours']} neighbours, features centred and of length 1. Prototypes: the nearest "
            "class mean of such features (SimpleShot).",
            f"- Few shots: {settings['episodes']} episodes for each seed, all scored tiles as queries; report.json has "
            "the spread over episodes too.",
            "- Macro-F1 and AUC weigh every class alike; AUC is of each class against the rest.",
            *([pooled] if folds else []),
            f"- A figure is the mean over {settings['seeds']} seeds. In brackets its 95 % interval: percentiles of "
            f"{settings['draws']} bootstrap draws of the scored groups (class by class) and of the seeds.",
            "- p: twice the share of draws in which the difference has the other sign or is 0; so many draws show "
            f"{2 / (settings['draws'] + 1):.3f} at the least. It is not corrected for the number of comparisons.",
            *(f"- Note: {note}." for note in report["notes"]),
        )
    )


def _limits(report: dict) -> str:
    return "\n".join(
        (
            "- The intervals tell how far the figures would move with other patients of this data set. They say "
            "nothing of other scanners, stains or laboratories.",
            "- With folds, the probes of two folds share training tiles, which the intervals do not count.",
            "- An encoder that was trained on scored tiles does better than it will elsewhere; this report cannot "
            "know what encoders were trained on.",
            "- For research: nothing here is validated for diagnosis.",
        )
    )
