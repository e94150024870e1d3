"""What a classifier predicts for a list of tiles, each tile once, whatever number of processes share the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset

from ssmamba_models.data.batches import read_batches
from ssmamba_models.data.tiles import TileDataset, collate_tiles
from ssmamba_models.engine.processes import default_workers, ignore_stop_signals
from ssmamba_models.inference import optimized_or_eager


@dataclass(frozen=True)
class Predictions:
    """Predictions of the N readable tiles.

    Attributes:
        indices: places of the tiles, rising.
        targets: (N,) int64, class indices.
        probabilities: (N, K) float64.
        loss: mean cross-entropy.
        unreadable: (place, reason) of the tiles that could not be read.
    """

    indices: list[int]
    targets: torch.Tensor
    probabilities: torch.Tensor
    loss: float
    unreadable: list[tuple[int, str]]


class Validation:
    """Predicts a set of tiles again and again.

    Args:
        data: the tiles and their transform.
        targets: N class indices.
        accelerator: of `create_accelerator`.
        batch_size: tiles per forward pass of each process.
        workers: processes that read tiles, for each process; None chooses by the machine.
    """

    def __init__(
        self, data: TileDataset, targets: Sequence[int], accelerator: Any, batch_size: int, workers: int | None
    ):
        self.data, self.targets, self.accelerator = data, torch.tensor(targets), accelerator
        processes = accelerator.num_processes
        share = range(accelerator.process_index, len(data), processes)
        workers = default_workers(accelerator.device, processes) if workers is None else workers
        self.loader = DataLoader(
            Subset(data, share),
            batch_size=batch_size,
            collate_fn=collate_tiles,
            num_workers=min(workers, -(-len(share) // batch_size)),
            worker_init_fn=ignore_stop_signals,
            # Its draw must not move the generator that the training resumes from.
            generator=torch.Generator(),
        )

    @torch.no_grad()
    def predict(self, network: nn.Module) -> Predictions:
        """Predict all tiles; every process gets all predictions.

        Args:
            network: in eval mode; maps images (B, 3, H, W) to logits (B, K).

        Raises:
            ValueError: no tile is readable.
            OSError: a process that reads tiles died.
        """
        indices, logits, unreadable = [], [], []
        precision = "bfloat16" if torch.is_autocast_enabled(self.accelerator.device.type) else "float32"
        runner = optimized_or_eager(network, precision, "the classifier")
        for batch in self._batches():
            unreadable += batch.unreadable
            if batch.images is not None:
                images = batch.images.to(self.accelerator.device, memory_format=torch.channels_last)
                indices += batch.indices
                logits.append(runner(images).double().cpu())
        return self._join(self._gather((indices, logits, unreadable)))

    def _batches(self) -> Iterator[Any]:
        return read_batches(self.loader, "reads validation tiles", ", then go on with --resume")

    def _gather(self, share: tuple) -> list[tuple]:
        if self.accelerator.num_processes == 1:
            return [share]
        from accelerate.utils import gather_object

        return gather_object([share])

    def _join(self, shares: list[tuple]) -> Predictions:
        indices = torch.tensor([index for share in shares for index in share[0]], dtype=torch.long)
        unreadable = sorted(bad for share in shares for bad in share[2])
        if len(indices) == 0:
            index, reason = unreadable[0]
            raise ValueError(
                f"none of the {len(self.data)} validation tiles is readable (first: {self.data.tiles.paths[index]}: "
                f"{reason})"
            )
        # Sorted, so that sums do not depend on who predicted what.
        order = indices.argsort()
        logits = torch.cat([batch for share in shares for batch in share[1]])[order]
        indices = indices[order]
        targets = self.targets[indices]
        return Predictions(
            indices=indices.tolist(),
            targets=targets,
            probabilities=logits.softmax(dim=1),
            loss=F.cross_entropy(logits, targets).item(),
            unreadable=unreadable,
        )
