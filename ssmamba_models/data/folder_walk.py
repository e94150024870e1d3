"""Walking a folder at any depth: what cannot be listed is an error, and links are followed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Set
from pathlib import Path


def walk_folder(
    root: str | os.PathLike, skip: Callable[[Path, Set[str]], bool] | None = None
) -> Iterator[tuple[Path, list[str]]]:
    """List a folder and those in it, at any depth.

    Hidden files and folders are left out. Links to folders are followed, each folder being listed once, by its own name
    rather than a link's.

    Args:
        root: the folder.
        skip: told a folder and the names of the files and folders in it, says whether it is left out, and all in it.

    Yields:
        A folder, and the names of its files, sorted.

    Raises:
        OSError: a folder cannot be listed.
    """
    folders: list[Path] = [Path(root)]
    links: list[Path] = []
    seen: set[str] = set()
    while folders or links:
        folder = (folders or links).pop()
        place = os.path.realpath(folder)
        if place in seen:
            continue
        seen.add(place)
        inner, files = _list(folder)
        if skip is not None and skip(folder, {*files, *(entry.name for entry in inner)}):
            continue
        yield folder, files
        for entry in reversed(inner):
            (links if entry.is_symlink() else folders).append(folder / entry.name)


def _list(folder: Path) -> tuple[list[os.DirEntry[str]], list[str]]:
    """The folders in a folder, and the names of the files, sorted."""
    folders: list[os.DirEntry[str]] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                # Asked of a link, this fails where what it leads to may not be seen.
                if entry.is_dir():
                    folders.append(entry)
                else:
                    files.append(entry.name)
    except OSError as error:
        raise OSError(
            f"{str(error.filename or folder)!r} cannot be searched ({error.strerror or error}); have it made readable, "
            "or name the other files and folders instead of the one that holds it"
        ) from error
    return folders, files
