"""The log of a run: log.jsonl, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ssmamba_models.output import whole_file
from ssmamba_models.progress import progress_bar


class RunLog:
    """Writes what a training reports; on processes other than the first it writes nothing.

    Args:
        run: the run folder.
        start, steps: steps done, and steps in all.
        main: whether this is the process that writes.
        progress: draw a progress bar on stderr.

    Raises:
        ImportError: tensorboard is missing.
    """

    def __init__(self, run: Path, start: int, steps: int, *, main: bool = True, progress: bool = True):
        self.main = main
        if not main:
            return
        cut_log(run / "log.jsonl", start)
        self.file = open(run / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self.board = _summary_writer()(run / "tensorboard", purge_step=start + 1 if start else None)
        self.bar = progress_bar("train", "step", progress, total=steps, done=start)

    def write(self, record: Mapping[str, Any], group: str = "train") -> None:
        """Append one line to log.jsonl, and its numbers to TensorBoard under `group`."""
        if not self.main:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                self.board.add_scalar(f"{group}/{name}", value, record["step"])

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        """Show an image, (3, H, W) in 0..1, in TensorBoard."""
        if self.main:
            self.board.add_image(name, image, step)

    def advance(self, loss: float) -> None:
        """One step done."""
        if self.main:
            self.bar.update()
            self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

    def tell(self, text: str) -> None:
        """Say something to the person at the terminal."""
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def sync(self) -> None:
        """Bring the log to the disk: a checkpoint must not be newer than its log."""
        if self.main:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.board.flush()

    def close(self) -> None:
        if self.main:
            self.bar.close()
            self.board.close()
            self.file.close()


def cut_log(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and a last line that was cut off, so that no step is there twice."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    with whole_file(path, overwrite=True) as part:
        part.write_text("".join(kept), encoding="utf-8")


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('training needs tensorboard; pip install "ssmamba-models[train]"') from error
    return SummaryWriter
