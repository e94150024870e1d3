"""What a benchmark hands over: a table for a person, a JSON file for a program."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from ssmamba_models.output import whole_file


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


def optional_number(value: float | None, spec: str) -> str:
    """`value` formatted by `spec`, or a dash where there is none."""
    return "-" if value is None else format(value, spec)


def write_json(path: str | os.PathLike, report: dict) -> None:
    """Write `report` whole or not at all, in place of a file that has the name.

    Raises:
        OSError: if it cannot be written there.
    """
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    with whole_file(path, overwrite=True) as part:
        part.write_text(text, encoding="utf-8")
