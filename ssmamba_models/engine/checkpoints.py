"""Checkpoints: the complete state of a training in one file that is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

from ssmamba_models.engine.short_memory import out_of_memory
from ssmamba_models.notice import first_line, one_line
from ssmamba_models.output import remove_unfinished, set_usual_mode, whole_file

# What keeps a whole file from being read.
_MACHINE = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ESTALE)


class Checkpoints:
    """The checkpoints of a run, RUN/checkpoints/step-00001234.pt.

    Args:
        folder: made if missing when the first is written.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        self.folder, self.keep = Path(folder), keep

    def paths(self) -> list[Path]:
        """Those that are there, oldest first."""
        named = [path for path in self.folder.glob("step-*.pt") if path.stem.removeprefix("step-").isdecimal()]
        return sorted(named, key=lambda path: int(path.stem.removeprefix("step-")))

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write one, then remove those beyond `keep` and those of later steps.

        Args:
            step: number of steps done.
            state: tensors, numbers, strings, and lists and dicts of them.

        Raises:
            OSError: it cannot be written (the disk is full, ...); those there are untouched.
        """
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        with explained_writing(path, _size(state)), whole_file(path, overwrite=True) as part:
            torch.save(dict(state), part)
        sync_folder(self.folder)
        self.prune(step)
        return path

    def prune(self, step: int) -> None:
        """Remove those beyond `keep`, and those of later steps: damaged ones, which the run went back behind.

        Args:
            step: that of a checkpoint known to be whole.
        """
        there = self.paths()
        kept = there[: there.index(self.folder / f"step-{step:08d}.pt") + 1][-self.keep :]
        for other in there:
            if other not in kept:
                other.unlink(missing_ok=True)

    def load(self, tell: Callable[[str], None]) -> dict[str, Any] | None:
        """Read the newest that is whole.

        Args:
            tell: called with a line for each damaged one that is passed over.

        Returns:
            The state, or None where there is no checkpoint.

        Raises:
            ValueError: there are checkpoints, and none can be read.
            OSError: the machine refuses to read one.
        """
        paths = self.paths()[::-1]
        for path in paths:
            try:
                _check_sums(path)
                # weights_only: a checkpoint is data, and must not run code.
                return torch.load(path, map_location="cpu", weights_only=True)
            # Broken files make torch raise what its parts raise: KeyError, EOFError, zlib.error and others.
            except Exception as error:
                # The file may be whole: a run that went back would in time remove it.
                if out_of_memory(error):
                    raise OSError(errno.ENOMEM, "the memory is too short to read it", str(path)) from error
                if getattr(error, "errno", None) in _MACHINE:
                    raise
                reason = first_line(error)
                tell(f"the checkpoint {str(path)!r} is damaged ({reason}); going back to the one before")
        if paths:
            raise ValueError(
                f"none of the {len(paths)} checkpoints in {str(self.folder)!r} can be read; start anew with "
                "another --out"
            )
        return None

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        remove_unfinished(self.folder)


def _check_sums(path: Path) -> None:
    # torch writes a checksum of every tensor, and does not look at it when it reads.
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise ValueError(f"{bad} does not fit its checksum")


def save_weights(path: str | os.PathLike, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors, float32, whole or not at all.

    Raises:
        OSError: they cannot be written.
    """
    tensors = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in state.items()
    }
    with explained_writing(Path(path), _size(tensors)), whole_file(path, overwrite=True) as part:
        # Not save_file: it writes beside `part` under a name of its own, which nobody clears away if it is killed.
        part.write_bytes(save(tensors, metadata=dict(metadata)))
        set_usual_mode(part)
    sync_folder(Path(path).parent)


def save_run_weights(run: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write RUN/weights.safetensors (see `save_weights`)."""
    save_weights(run / "weights.safetensors", state, metadata)


def plain_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state dict as an ordinary dict, which any version of torch reads with weights_only."""
    return dict(module.state_dict())


@contextlib.contextmanager
def explained_writing(path: Path, size: int) -> Iterator[None]:
    """Turn what torch and safetensors raise when writing fails into an OSError that says what to do."""
    try:
        yield
    # torch's and safetensors' writers hide the reason behind errors of their own.
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"cannot write {str(path)!r} ({one_line(error)[:200]}): it needs about {size / 1e6:.0f} MB, "
            f"{free / 1e6:.0f} MB are free; what was written before is whole: make room, then go on with --resume"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power failure."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(state: Any) -> int:
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(_size, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(_size, state))
    return 8
