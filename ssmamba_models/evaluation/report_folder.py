"""The folder of a report: its files appear together when all are done, and features of earlier runs stay."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ssmamba_models.output import check_output

FEATURES, PLOTS = "features", "plots"
REPORT = "report.json"
MARKDOWN = "report.md"


def check_report_folder(out: str | os.PathLike, overwrite: bool = False) -> Path:
    """Make sure, before a long run, that a report can be written.

    A folder that holds features alone is what an interrupted run left: it is taken up without `overwrite`.

    Args:
        out: the folder; it is made when the first file is written, the folder around it must exist.
        overwrite: whether an existing report may be replaced.

    Raises:
        FileExistsError: it holds a report and `overwrite` is False, or it holds other things.
        NotADirectoryError: it is a file.
        ValueError, OSError: as `check_output`.
    """
    folder = Path(out)
    if folder.is_dir():
        _check_contents(folder, overwrite)
        check_output(folder / REPORT, overwrite=True)
        return folder
    if folder.exists():
        raise NotADirectoryError(f"the output {str(folder)!r} is a file; name a folder for the report")
    return check_output(out)


def _check_contents(folder: Path, overwrite: bool) -> None:
    visible = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    foreign = sorted(visible - {FEATURES, PLOTS, REPORT, MARKDOWN})
    if foreign:
        raise FileExistsError(
            f"the folder {str(folder)!r} holds other things ({foreign[0]!r}); name a new folder for the report"
        )
    if REPORT in visible and not overwrite:
        raise FileExistsError(
            f"the folder {str(folder)!r} holds a report; replace it with --overwrite (overwrite=True), which uses its "
            "features again, or choose another folder"
        )


@contextlib.contextmanager
def whole_report(folder: Path) -> Iterator[Path]:
    """Write a report whole or not at all.

    Gives an empty hidden folder inside `folder` to write in (with `plots/`). When the block ends, its files take their
    places, report.json last; when it raises, it is removed and an existing report is untouched.

    Args:
        folder: the folder of the report, which exists.
    """
    part = folder / f".report-{secrets.token_hex(4)}.part"
    (part / PLOTS).mkdir(parents=True)
    try:
        yield part
        _move_in(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move_in(part: Path, folder: Path) -> None:
    (folder / PLOTS).mkdir(exist_ok=True)
    plots = sorted(path.name for path in (part / PLOTS).iterdir())
    for name in [*(f"{PLOTS}/{plot}" for plot in plots), MARKDOWN, REPORT]:
        with open(part / name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part / name, folder / name)
    for stale in (folder / PLOTS).iterdir():
        if stale.name not in plots and stale.suffix == ".png":
            stale.unlink()
