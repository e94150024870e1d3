"""Output files that are whole or not there: checked before a long run, renamed into place after it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

_UNFINISHED = re.compile(r"\..*\.[0-9a-f]{8}\.part(\..*)?|\.ssmamba-probe-[0-9a-f]{8}")


def check_output(path: str | os.PathLike, overwrite: bool = False) -> Path:
    """Make sure, before a long run, that a file can be written at its end.

    Args:
        path: the file to be written; its folder must exist.
        overwrite: whether an existing file may be replaced.

    Returns:
        The path.

    Raises:
        ValueError: the path is empty.
        FileExistsError: the file exists and may not be replaced.
        FileNotFoundError: its folder does not exist (no folder is created: it may be a misspelling).
        NotADirectoryError, IsADirectoryError, PermissionError, OSError: it cannot be written there.
    """
    if not os.fspath(path):
        raise ValueError("the output's name (--out, out=...) is empty; name the file to write")
    out = Path(path)
    folder = out.parent
    try:
        _check_kinds(out, folder)
    except NotADirectoryError as error:
        raise NotADirectoryError(
            f"cannot write {str(out)!r}: a part of {str(folder)!r} is a file, not a folder"
        ) from error
    if out.exists() and not overwrite:
        raise FileExistsError(
            f"the output {str(out)!r} exists; replace it with --overwrite (overwrite=True) or choose another name"
        )
    _probe_writing(folder)
    return out


def _check_kinds(out: Path, folder: Path) -> None:
    # listdir, unlike Path.exists, tells a missing folder from a path that leads through a file.
    try:
        os.listdir(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the output's folder {str(folder)!r} does not exist; create it (mkdir -p) or choose another"
        ) from error
    except PermissionError:
        pass  # a folder may be writable without being listable: the probe decides
    if out.is_dir():
        raise IsADirectoryError(f"the output {str(out)!r} is a folder; name a file in it")


def _probe_writing(folder: Path) -> None:
    # Permission bits say too little (root, network mounts, read-only file systems): only writing tells.
    probe = folder / f".ssmamba-probe-{secrets.token_hex(4)}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(
            f"cannot write in the output's folder {str(folder)!r} ({error.strerror}); choose a writable one"
        ) from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Write a file whole or not at all.

    Gives the path of a hidden file beside the output, to be written in the block. When the block ends, that
    file is flushed to the disk and renamed; when it raises (Ctrl-C included), it is removed and an existing
    output is untouched.

    Args:
        path: the file to write.
        overwrite: whether an existing file may be replaced.

    Raises:
        OSError: as `check_output`, or flushing fails.
        FileExistsError: the output appeared while the block ran, and may not be replaced.
    """
    out = check_output(path, overwrite)
    # The suffix stays last: Pillow and others choose the format by it.
    part = out.with_name(f".{out.stem}.{secrets.token_hex(4)}.part{out.suffix}")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        if out.exists() and not overwrite:
            raise FileExistsError(f"the output {str(out)!r} appeared during the run; it is left as it is")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def is_unfinished(path: str | os.PathLike) -> bool:
    """Whether a file is one that `whole_file` or `check_output` makes for a while; killed processes leave them."""
    return _UNFINISHED.fullmatch(Path(path).name) is not None


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove what killed processes left half-written in a folder, if it exists; nobody may be writing there now."""
    for path in Path(folder).glob(".*"):
        if is_unfinished(path):
            path.unlink(missing_ok=True)


def set_usual_mode(path: str | os.PathLike) -> None:
    """Let those read a file who may read others of this user: safetensors makes files for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
