"""Batches of a loader, with a message for a person where a process that reads them dies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from ssmamba_models.notice import first_line


def read_batches(loader: DataLoader, doing: str, afterwards: str = "") -> Iterator[Any]:
    """Yield a loader's batches.

    Args:
        loader: the loader; one pass over it is made.
        doing: what its processes do, such as "reads tiles"; for the message.
        afterwards: what to do once the cause is mended, such as ", then go on with --resume".

    Raises:
        OSError: a process of the loader died, for want of memory in most cases.
    """
    try:
        yield from loader
    except RuntimeError as error:
        # Torch says so of a process that is gone; an exception in one that lives reads "Caught ... in DataLoader
        # worker process 0", and is no matter of memory.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise OSError(
            f"a process that {doing} died ({first_line(error)}); memory or /dev/shm may be short: use fewer "
            f"--workers (0 reads in the main process){afterwards}"
        ) from error
