"""Which files of a folder are slides, and which files are one slide."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Set
from pathlib import Path

from ssmamba_models.data.folder_walk import walk_folder
from ssmamba_models.data.slide_table import SLIDE_SUFFIXES
from ssmamba_models.wsi.companions import companions
from ssmamba_models.wsi.dicom_series import series_uid

# Only what `JobFolder.open` writes says this; a user's own config.yaml beside slides does not.
_JOB_MARK = re.compile(rb"^configuration_hash: ['\"]?[0-9a-f]{64}['\"]?\s*$", re.MULTILINE)
_CONFIG_BYTES = 2**20


def search_slides(folder: Path) -> Iterator[Path]:
    """The files in a folder that may be slides, at any depth.

    Hidden files and folders are left out, and so are job folders, whose pictures are no slides, and the pictures that a
    .vms or .vmu consists of. Links to folders are followed.

    Raises:
        OSError: a folder cannot be listed.
    """
    for inner, names in walk_folder(folder, skip=_is_job):
        parts = set(_parts(inner, names))
        for name in names:
            if _suffix(name) in SLIDE_SUFFIXES and name not in parts:
                yield inner / name


def slide_key(path: Path) -> Hashable:
    """What is equal for paths that open the same slide: links to one file, and DICOM files of one series and folder."""
    if _suffix(path.name) == ".dcm":
        with contextlib.suppress(OSError):  # that slide fails, with the reason, when its turn comes
            series = series_uid(path)
            if series is not None:
                # OpenSlide opens the series from any of its files, and looks for the others beside that one.
                return os.path.realpath(path.parent), series
    return os.path.realpath(path)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_job(folder: Path, names: Set[str]) -> bool:
    if "config.yaml" not in names:
        return False
    try:
        with open(folder / "config.yaml", "rb") as file:
            return _JOB_MARK.search(file.read(_CONFIG_BYTES)) is not None
    except OSError:
        return False  # ours can be read by whoever works on the job


def _parts(folder: Path, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if _suffix(name) in (".vms", ".vmu"):
            with contextlib.suppress(OSError):  # as with DICOM
                yield from companions(folder / name)
