"""The folder of a run: a new one, or one that is gone on with under the same configuration, by one job at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from ssmamba_models.engine.checkpoints import Checkpoints
from ssmamba_models.engine.config import Dataclass, config_values, load_config, save_config
from ssmamba_models.locks import BEAT, STALE, Locks
from ssmamba_models.notice import SSMambaWarning
from ssmamba_models.output import is_unfinished, remove_unfinished

_LOCKS, _LOCK = ".locks", "run"


class RunConfig(Dataclass, Protocol):
    """The configuration of a training.

    Attributes:
        HARMLESS: what a resumed run may change.
    """

    HARMLESS: ClassVar[frozenset[str]]


@contextlib.contextmanager
def open_run(folder: str | os.PathLike, config: RunConfig, resume: bool, *, main: bool = True) -> Iterator[Path]:
    """Make a run folder and write its config.yaml, or check that an existing one may go on; nobody else may meanwhile.

    Args:
        folder: the run folder; its parent must exist.
        config: of the training.
        resume: whether an existing run may go on; a run that is not there yet starts.
        main: False for the other processes of a job, which touch nothing.

    Yields:
        The folder, which is ours within the block.

    Raises:
        FileExistsError: there is a run or another file, and `resume` is False; or another training is at work there.
        FileNotFoundError, NotADirectoryError: the parent folder is not there.
        ValueError: the run was begun with other hyper-parameters; each is named.
        OSError: the folder cannot be written.
    """
    if not os.fspath(folder):
        raise ValueError("the run's folder (--out, out=...) is empty; name the folder to write")
    run = Path(folder)
    if not main:
        yield run
        return
    _check_place(run, resume)
    saved = run / "config.yaml"
    if saved.exists():
        _check_same(load_config(type(config), saved), config, run)
    run.mkdir(exist_ok=True)
    with Locks(run / _LOCKS) as locks:
        _acquire(locks, run)
        for folder in (run, run / "reconstructions"):
            remove_unfinished(folder)
        save_config(config, saved)
        Checkpoints(run / "checkpoints").clean()
        yield run


class InitConfig(Dataclass, Protocol):
    """The configuration of a training.

    Attributes:
        init: where the first weights come from.
    """

    @property
    def init(self) -> str: ...


Config = TypeVar("Config", bound=InitConfig)


def without_lost_init(config: Config, folder: str | os.PathLike, resume: bool) -> Config:
    """The configuration to make the network of a resumed run by, whose first weights may have been moved since.

    Args:
        config: of the training.
        folder: the run folder.
        resume: whether an existing run goes on.

    Returns:
        `config`; with init "none" where its file is gone and a checkpoint, which holds all weights, is there.

    Raises:
        ValueError, OSError: there are checkpoints, and none can be read.
    """
    if not resume or config.init in ("none", "pretrained") or Path(config.init).exists():
        return config
    if Checkpoints(Path(folder) / "checkpoints").load(lambda line: None) is None:
        return config
    return dataclasses.replace(config, init="none")


def _acquire(locks: Locks, run: Path) -> None:
    """Take the run's lock; where its owner is on another machine, wait until it must be dead if it does not beat."""
    if locks.acquire(_LOCK) is not None:
        return
    owner, here = locks.owner(_LOCK)
    if not here:
        patience = STALE + 2 * BEAT
        said = f"{str(run)!r} is held by {owner}; waiting {patience:.0f} s for a sign of life"
        warnings.warn(said, SSMambaWarning, stacklevel=4)
        if locks.acquire(_LOCK, patience) is not None:
            return
    raise FileExistsError(
        f"{str(run)!r} is being trained by {owner}; wait for it or stop it, or begin another run with another --out"
    )


def _check_place(run: Path, resume: bool) -> None:
    if not run.parent.is_dir():
        raise FileNotFoundError(
            f"the folder {str(run.parent)!r}, in which the run would lie, does not exist; create it (mkdir -p)"
        )
    if run.exists() and not run.is_dir():
        raise NotADirectoryError(f"the run's folder {str(run)!r} is a file; choose another --out")
    if not run.exists() or all(is_unfinished(path) or path.name == _LOCKS for path in run.iterdir()):
        return
    if not (run / "config.yaml").exists():
        raise FileExistsError(f"{str(run)!r} holds other files than a run's (no config.yaml); choose another --out")
    if not resume:
        raise FileExistsError(
            f"{str(run)!r} holds a run; go on with it by --resume (resume=True), or choose another --out"
        )


def _check_same(saved: RunConfig, config: RunConfig, run: Path) -> None:
    before, now = config_values(saved), config_values(config)
    changed = [key for key in now if key not in config.HARMLESS and now[key] != before[key]]
    if changed:
        listed = "; ".join(f"{key}: {before[key]!r}, now {now[key]!r}" for key in changed)
        raise ValueError(
            f"{str(run)!r} was begun with other settings ({listed}); give the same ones (or --resume --out alone), "
            "or begin another run with another --out"
        )
