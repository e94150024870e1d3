"""The table of labels of slides: a line for each slide, with its class and, where they are known, patient and split."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from ssmamba_models.data.csv_rows import Row, column_places, read_csv_rows
from ssmamba_models.data.slide_table import names_of_entry

SPLITS = ("train", "val", "test")
# Names in use for whose slide it is.
_PATIENT = ("patient", "group")


def read_slide_labels(path: str | os.PathLike) -> list[dict[str, str]]:
    """Read a table of labels.

    Args:
        path: CSV with the columns `slide` and `label` and, each optional, `patient` (or `group`; else each slide is a
            patient of its own) and `split` (train, val, test); others are ignored.

    Returns:
        For each line slide, label, and patient and split where there are such columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no CSV, a column or entry is missing, no line, or an unknown split.
    """
    path = Path(path)
    header, lines = _read_table(path)
    columns = column_places(path, header, ("slide", "label", "split", *_PATIENT))
    for name in ("slide", "label"):
        if name not in columns:
            raise ValueError(
                f"{str(path)!r} has no column {name!r} (its columns: {', '.join(header)}); expected a first line such "
                "as slide,label,patient,split, separated by commas"
            )
    wanted: dict[str, int] = {name: columns[name] for name in ("slide", "label", "split") if name in columns}
    patient = next((name for name in _PATIENT if name in columns), None)
    if patient is not None:
        wanted["patient"] = columns[patient]
    rows = []
    for number, fields in lines:
        row = {name: fields[place].strip() for name, place in wanted.items()}
        for name, value in row.items():
            if not value:
                raise ValueError(f"{str(path)!r}, line {number}: the {name} is empty; fill it in or take the line out")
        if "split" in row:
            row["split"] = row["split"].lower()
            if row["split"] not in SPLITS:
                raise ValueError(
                    f"{str(path)!r}, line {number}: the split is {row['split']!r}, expected train, val or test"
                )
        rows.append(row)
    return rows


def _read_table(path: Path) -> tuple[list[str], list[Row]]:
    if not path.is_file():
        raise FileNotFoundError(f"the table of labels {str(path)!r} does not exist (or is a folder)")
    return read_csv_rows(path, "slide")


def match_slides(
    rows: Iterable[Mapping[str, str]], known: Collection[str], table: str | os.PathLike
) -> tuple[dict[str, dict[str, str | None]], tuple[str, ...]]:
    """Find the slides of a table among those that there are; a slide may have its file's suffix.

    Args:
        rows: of `read_slide_labels`.
        known: names of the slides that there are.
        table: the table, for messages.

    Returns:
        Slide -> label, patient and split, of those that are there; and the names of the others.

    Raises:
        ValueError: a slide stands in the table twice.
    """
    found: dict[str, dict[str, str | None]] = {}
    missing: dict[str, None] = {}
    for row in rows:
        slide = next((name for name in names_of_entry(row["slide"]) if name in known), row["slide"])
        if slide in found or slide in missing:
            raise ValueError(f"{os.fspath(table)!r} names the slide {row['slide']!r} twice; a slide has one line")
        if slide not in known:
            missing[slide] = None
            continue
        found[slide] = {"label": row["label"], "patient": row.get("patient", slide), "split": row.get("split")}
    return found, tuple(missing)


def check_slide_labels(found: Mapping[str, Mapping[str, str | None]], table: str | os.PathLike) -> None:
    """Make sure that there is something to tell apart, and that no patient is on both sides.

    Args:
        found: of `match_slides`.
        table: the table, for messages.

    Raises:
        ValueError: fewer than two classes, or a patient in two splits.
    """
    classes = sorted({label for facts in found.values() if (label := facts["label"]) is not None})
    if len(classes) < 2:
        raise ValueError(
            f"all slides in {os.fspath(table)!r} that have features are of class {classes[0]!r}; two are needed"
        )
    check_patient_splits(found, table)


def check_patient_splits(found: Mapping[str, Mapping[str, str | None]], table: str | os.PathLike) -> None:
    """Make sure that no patient is on both sides.

    Args:
        found: of `match_slides`.
        table: the table, for messages.

    Raises:
        ValueError: a patient is in two splits.
    """
    split_of: dict[str | None, str | None] = {}
    for facts in found.values():
        patient, split = facts["patient"], facts["split"]
        if split_of.setdefault(patient, split) != split:
            raise ValueError(
                f"the patient {patient!r} is in two splits, {split_of[patient]!r} and {split!r}: what is learned from "
                f"one slide would be tested on the other; give all slides one split in {os.fspath(table)!r}"
            )


def some_names(names: Sequence[str], count: int = 3) -> str:
    """The first few of many names, for a message."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + more
