"""A table in a CSV file: its header and its lines, with errors that name the line."""

from __future__ import annotations

import csv
from pathlib import Path

Row = tuple[int, list[str]]  # the number of the line, and its fields


def read_csv_rows(path: Path, each: str) -> tuple[list[str], list[Row]]:
    """The header, and the number and fields of each line below it; blank lines are left out.

    Args:
        path: the file.
        each: what a line stands for, such as "tile".

    Raises:
        ValueError: not UTF-8, not CSV, no line below the header, or a line with another number of fields.
        OSError: the file cannot be read.
    """
    name = repr(str(path))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, fields) for fields in reader if any(field.strip() for field in fields)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error.reason}); save it as CSV UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{name} is not CSV (line {reader.line_num}: {error})") from error
    if len(lines) < 2:
        raise ValueError(f"{name} has no rows; expected a header and a line for each {each}")
    header = lines[0][1]
    for line, fields in lines[1:]:
        if len(fields) != len(header):
            raise ValueError(
                f"{name}, line {line}: {len(fields)} fields, but the header has {len(header)}; "
                "quote entries that hold a comma"
            )
    return header, lines[1:]
