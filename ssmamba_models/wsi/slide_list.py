"""Which slides a job has: files and folders in, a list of distinct names out."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssmamba_models.data.slide_table import SLIDE_SUFFIXES, slide_name
from ssmamba_models.locks import JOB_LOCK
from ssmamba_models.wsi.mpp import find_mpp
from ssmamba_models.wsi.slide_search import search_slides, slide_key

# File systems allow 255 bytes; `whole_file` needs 23 of them for ".NAME.01234567.part.geojson".
_LONGEST_NAME = 255 - 23


@dataclass(frozen=True)
class SlideFile:
    """A slide of a job.

    Attributes:
        path: its file.
        name: what its outputs are called.
        mpp: um per level-0 pixel as the user says, or None.
    """

    path: str
    name: str
    mpp: float | None = None

    @property
    def bytes(self) -> int:
        """Size of the file now; 0 where there is none."""
        try:
            return os.path.getsize(self.path)
        except OSError:
            return 0


def find_slides(
    places: str | os.PathLike | Iterable[str | os.PathLike],
    mpp_override: float | None = None,
    mpp_table: Mapping[str, float] | None = None,
) -> list[SlideFile]:
    """List the slides of a job.

    Args:
        places: files, which may have any suffix, and folders, which are searched at any depth for `SLIDE_SUFFIXES`;
            hidden files and folders are left out, and so are job folders (see `search_slides`). Of DICOM files of one
            series in one folder the first by name stands for the slide.
        mpp_override: um per level-0 pixel of all slides.
        mpp_table: what `read_mpp_csv` gave; goes before `mpp_override`.

    Returns:
        The slides, sorted by name.

    Raises:
        FileNotFoundError: a place does not exist.
        OSError: a folder cannot be listed.
        ValueError: there is no slide, two have one name, a name is no text or too long, or the table names none of
            them.
    """
    places = [places] if isinstance(places, (str, os.PathLike)) else list(places)
    paths: dict[Hashable, Path] = {}
    for path in sorted(path for place in places for path in _files(Path(place))):
        paths.setdefault(slide_key(path), path)
    if not paths:
        raise ValueError(
            f"no slide found in {', '.join(repr(os.fspath(place)) for place in places) or 'nothing'}; looked for "
            f"{', '.join(sorted(SLIDE_SUFFIXES))}, but not in job folders; name a file of another suffix itself"
        )
    slides = [_slide(path, mpp_override, mpp_table or {}) for path in paths.values()]
    _check_distinct(slides)
    _check_table(slides, mpp_table or {})
    return sorted(slides, key=lambda slide: slide.name)


def _files(place: Path) -> Iterator[Path]:
    if not place.exists():
        raise FileNotFoundError(f"the slide or folder {str(place)!r} does not exist; check its spelling")
    if place.is_dir():
        yield from search_slides(place)
    else:
        yield place


def _slide(path: Path, mpp_override: float | None, mpp_table: Mapping[str, float]) -> SlideFile:
    name = slide_name(path)
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the name of the slide {os.fsencode(path)!r} is not valid UTF-8; rename it") from error
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"the name of the slide {str(path)!r} is too long for files that are called after it (at most "
            f"{_LONGEST_NAME} bytes without the suffix); rename it"
        )
    if name == JOB_LOCK:
        raise ValueError(f"the slide {str(path)!r} has the name of the job's own lock; rename it")
    mpp = find_mpp(mpp_table, path)
    return SlideFile(os.path.abspath(path), name, mpp_override if mpp is None else mpp)


def _check_distinct(slides: Iterable[SlideFile]) -> None:
    first: dict[str, SlideFile] = {}
    for slide in slides:
        other = first.setdefault(slide.name, slide)
        if other is not slide:
            raise ValueError(
                f"two slides are called {slide.name!r}: {other.path!r} and {slide.path!r}; their features would be one "
                "file: rename one, or extract them into two jobs (--out)"
            )


def _check_table(slides: Iterable[SlideFile], mpp_table: Mapping[str, float]) -> None:
    # A table may be that of many jobs, but one that says nothing of any slide is another's, or misspelt.
    if mpp_table and all(find_mpp(mpp_table, slide.path) is None for slide in slides):
        raise ValueError(
            f"the table of mpp names none of the slides: it has {next(iter(mpp_table))!r}, for example, and the "
            f"slides {next(iter(slides)).name!r}; slides go by their file's name, with or without its suffix"
        )


def shard_order(slides: Sequence[SlideFile], shard: tuple[int, int] | None) -> list[SlideFile]:
    """The order in which one of several shards goes through the slides: its own share first, then the others'.

    Args:
        slides: of the whole job.
        shard: (i, n), the i-th of n, from 1; None is the only one.

    Returns:
        All slides. What another shard did, or is doing, is left out when its turn comes.
    """
    if shard is None:
        return list(slides)
    index, count = shard
    return [slide for offset in range(count) for slide in slides[(index - 1 + offset) % count :: count]]


def parse_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Read "i/n", or where it is not given a SLURM array's own numbers.

    Args:
        text: "2/4" is the second of four.
        environment: where SLURM_ARRAY_TASK_ID, _COUNT, _MIN and _STEP are looked up.

    Returns:
        (i, n), or None outside an array.

    Raises:
        ValueError: it is not i/n with 1 <= i <= n, or the array's numbers are none.
    """
    if text is None:
        return _slurm_shard(environment)
    index, slash, count = text.partition("/")
    if not (slash and index.strip().isdecimal() and count.strip().isdecimal()):
        raise ValueError(f"--shard {text!r} is not i/n, such as 2/4 for the second of four")
    if not 1 <= int(index) <= int(count):
        raise ValueError(f"--shard {text!r}: the shards of {count} are 1/{count} to {count}/{count}")
    return int(index), int(count)


def _slurm_shard(environment: Mapping[str, str]) -> tuple[int, int] | None:
    names = {"ID": None, "COUNT": None, "MIN": "0", "STEP": "1"}
    found = [environment.get(f"SLURM_ARRAY_TASK_{name}", default) for name, default in names.items()]
    values = [value for value in found if value is not None]
    if len(values) < len(found):
        return None
    try:
        task, count, least, step = map(int, values)
    except ValueError as error:
        raise ValueError(f"SLURM_ARRAY_TASK_ID and the like are {values}, no numbers; give --shard i/n") from error
    return (task - least) // max(step, 1) % count + 1, count
