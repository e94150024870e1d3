"""HDF5 files written so that a full disk is an error like any other.

Where a write fails beneath it, HDF5 cannot close the file, and the process dies of a segmentation fault when it tries
to (1.14, by way of h5py 3). So it writes through a file that remembers the first error, and takes what comes after.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

from ssmamba_models.data.hdf5 import require_h5py
from ssmamba_models.stopping import stops_wait


class CarefulFile(io.FileIO):
    """A new file that never fails to be written, but remembers that it did.

    Attributes:
        error: the first error in writing, or None. After it nothing is written any more.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path, "x+")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        done = 0
        # The system may write a part at a time: up to the limit, say, before it fails.
        while done < len(data) and self.error is None:
            done += self._try(super().write, data[done:])
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self._try(super().truncate, size)
        return self.tell() if size is None else size

    def _try(self, act: Callable[[Any], int], argument: Any) -> int:
        try:
            return act(argument) if self.error is None else 0
        except OSError as error:
            self.error = error
            return 0

    def check(self) -> None:
        """Raise the error of a write that failed, if one did."""
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def create_hdf5(path: str | os.PathLike) -> Iterator[tuple[Any, CarefulFile]]:
    """Create an HDF5 file. What writes to it belongs into `stops_wait`.

    Args:
        path: it must not exist.

    Yields:
        The open `h5py.File`, and the file beneath it, to be asked by `check` now and then.

    Raises:
        ImportError: h5py is missing.
        OSError: the file exists or cannot be written; at the end of the block, if it was not asked for before.
    """
    h5py = require_h5py()
    with CarefulFile(path) as disk:
        try:
            with stops_wait():
                file = h5py.File(disk, "w")
            try:
                yield file, disk
            finally:
                with stops_wait():
                    file.close()
        except Exception as error:
            # HDF5 stumbles over what was not written, and speaks of heaps and trees.
            if disk.error is not None and error is not disk.error:
                raise disk.error from error
            raise
        disk.check()
