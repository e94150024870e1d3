"""What a benchmark hands over: a table for a person, a JSON file for a program."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns two spaces apart: the first `left` flush left, the others, which hold numbers, flush right.

    A row may be shorter than the headers: its last cell is then a remark and runs on to the right.
    """
    full = [row for row in rows if len(row) == len(headers)]
    widths = [max(len(row[i]) for row in [headers, *full]) for i in range(len(headers))]
    for row in rows:
        for i, cell in enumerate(row[:-1]):
            widths[i] = max(widths[i], len(cell))
    return "\n".join(_format_row(row, widths, left) for row in [headers, *rows])


def _format_row(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    is_remark = len(row) < len(widths)
    cells = []
    for i, cell in enumerate(row):
        last_of_remark = is_remark and i == len(row) - 1
        cells.append(cell.ljust(widths[i]) if i < left or last_of_remark else cell.rjust(widths[i]))
    return "  ".join(cells).rstrip()


def check_writable(path: str | os.PathLike) -> None:
    """Find out before a long run, not after it, that its report has nowhere to go.

    Raises:
        OSError: if `path` is a folder, or its folder does not exist or takes no files.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it, such as {path / 'benchmark.json'}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; create it, or write elsewhere")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the folder {path.parent} cannot be written to; write elsewhere")


def write_json(path: str | os.PathLike, report: dict) -> None:
    """Write `report` whole or not at all: into a temporary file beside `path`, which then takes its name."""
    check_writable(path)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
