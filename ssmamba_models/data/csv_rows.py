"""A table in a CSV file: its header and its lines, with errors that name the line."""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from pathlib import Path

Row = tuple[int, list[str]]  # the number of the line, and its fields


def read_csv_rows(path: Path, each: str) -> tuple[list[str], list[Row]]:
    """The header, and the number and fields of each line below it; blank lines are left out.

    Args:
        path: the file.
        each: what a line stands for, such as "tile".

    Raises:
        ValueError: not UTF-8, not CSV, a NUL character, no line below the header, or a line with another number of
            fields.
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
    # Python 3.11 and later read them as they read letters; no file name can hold one.
    line = next((line for line, fields in lines if any("\0" in field for field in fields)), None)
    if line is not None:
        raise ValueError(f"{name}, line {line}: a NUL character; is it text? Save it as CSV UTF-8")
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


def column_places(path: Path, header: Sequence[str], known: Collection[str]) -> dict[str, int]:
    """Where the known columns stand: name -> place; upper case and blanks around a name do not matter.

    Args:
        path: the file, for messages.
        header: of `read_csv_rows`.
        known: names in lower case; other columns are passed over.

    Raises:
        ValueError: a known column stands there twice.
    """
    places: dict[str, int] = {}
    for place, title in enumerate(header):
        name = title.strip().lower()
        if name in known and places.setdefault(name, place) != place:
            raise ValueError(f"{str(path)!r} has two columns {name!r}; take one out, or rename it")
    return places
