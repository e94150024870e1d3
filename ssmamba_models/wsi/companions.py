"""Slides of several files: what belongs to a .mrxs, .vms, .vmu or .dcm, and what of it is missing."""

from __future__ import annotations

import os
import re
from pathlib import Path

# What Hamamatsu's .vms and .vmu, and MIRAX's Slidedat.ini, name of other files.
_NAMED = re.compile(
    r"^\s*(?:(?:ImageFile|MapFile|MacroImage)(?:\([\d, ]*\))?|FILE_\d+|INDEXFILE)\s*=\s*(\S[^\r\n]*?)\s*$", re.MULTILINE
)
_INI_BYTES = 2**20


def companions(path: str | os.PathLike) -> list[str]:
    """The names of the files beside it that a .vms or .vmu, or MIRAX's Slidedat.ini, names.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return _NAMED.findall(file.read(_INI_BYTES).decode("latin-1"))


def what_is_missing(path: str | os.PathLike) -> str | None:
    """What a slide of several files, which cannot be opened, lacks of them, and the cure.

    Args:
        path: the file that stands for the slide.

    Returns:
        Part of a sentence; None where slides of this suffix are one file.

    Raises:
        OSError: a file cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        return _of_mirax(path.with_suffix(""))
    if suffix in (".vms", ".vmu"):
        return _of_list(path, f"copy all that lies beside the {suffix}")
    if suffix == ".dcm":
        return "all .dcm files of its series belong into one folder; copy the slide's folder again, whole"
    return None


def _of_mirax(folder: Path) -> str:
    if not folder.is_dir():
        return f"its data folder {str(folder)!r} is missing; copy that too, beside the .mrxs"
    index, cure = folder / "Slidedat.ini", "copy that folder again, whole"
    return _of_list(index, cure) if index.is_file() else f"its data folder {str(folder)!r} has no Slidedat.ini; {cure}"


def _of_list(index: Path, cure: str) -> str:
    missing = [name for name in companions(index) if not (index.parent / name).exists()]
    if missing:
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        return f"{missing[0]!r}{others}, which {str(index)!r} names, is missing; {cure}"
    return f"some of the files that {str(index)!r} names may be incomplete; {cure}"
