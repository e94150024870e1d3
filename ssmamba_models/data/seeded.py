"""Training data whose order and random views depend on the seed alone, not on workers, processes or interruptions."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from ssmamba_models.data.labelled import LabelledTiles
from ssmamba_models.data.tiles import read_tile
from ssmamba_models.notice import one_line


def mixed_seed(*parts: int) -> int:
    """One seed from several numbers: neighbouring numbers give unrelated seeds, below 2**63."""
    text = " ".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def epoch_order(count: int, seed: int, epoch: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The order in which an epoch visits its tiles.

    Args:
        count: N, the number of tiles.
        seed, epoch: decide the order, and nothing else does.
        weights: (N,) chances of each tile to be drawn, with replacement.

    Returns:
        A permutation of 0..N-1, or with `weights` N draws of them, (N,) int64.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    if weights is not None:
        return torch.multinomial(weights, count, replacement=True, generator=generator)
    return torch.randperm(count, generator=generator)


class GlobalBatches(Sampler):
    """The batches that one process reads, from any step to the end of the training: (epoch, tile) pairs.

    A tile that is drawn again in the same epoch has a third number, how often it was drawn before: its views differ.

    Every step has one global batch, the same however many processes there are. It is cut into
    `processes * accumulate` equal parts; this sampler yields this process's `accumulate` parts of each step, one after
    the other. An epoch's last tiles, too few for a batch, are left out; the next epoch's order leaves out others.

    Args:
        count: number of tiles.
        batch_size: tiles per step, over all processes and parts.
        epochs: length of the training.
        seed: of the order.
        start: number of steps already done.
        process, processes: which process of how many this is.
        accumulate: parts per process.
        weights: as `epoch_order`.
        noun: what a tile is called where it is something else.

    Raises:
        ValueError: fewer tiles than a batch, or a batch that cannot be cut evenly.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        epochs: int,
        seed: int,
        start: int = 0,
        process: int = 0,
        processes: int = 1,
        accumulate: int = 1,
        weights: torch.Tensor | None = None,
        noun: str = "tile",
    ):
        if count < batch_size:
            there = f"1 {noun} is" if count == 1 else f"{count} {noun}s are"
            raise ValueError(
                f"{there} fewer than one batch of {batch_size}; use --batch-size {count} or less, or more {noun}s"
            )
        if batch_size % (processes * accumulate):
            raise ValueError(
                f"batch_size is {batch_size}, expected a multiple of processes x accumulate = {processes} x "
                f"{accumulate} = {processes * accumulate}; change --batch-size or --accumulate"
            )
        self.count, self.batch_size, self.seed, self.start = count, batch_size, seed, start
        self.process, self.processes, self.accumulate, self.weights = process, processes, accumulate, weights
        self.steps_per_epoch = count // batch_size
        self.steps = self.steps_per_epoch * epochs

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        part = self.batch_size // (self.processes * self.accumulate)
        step = self.start
        while step < self.steps:
            epoch = step // self.steps_per_epoch
            order = _numbered(epoch_order(self.count, self.seed, epoch, self.weights).tolist())
            for place in range(step % self.steps_per_epoch, self.steps_per_epoch):
                for micro in range(self.accumulate):
                    first = place * self.batch_size + (micro * self.processes + self.process) * part
                    yield [(epoch, *drawn) for drawn in order[first : first + part]]
            step = (epoch + 1) * self.steps_per_epoch


def _numbered(order: list[int]) -> list[tuple[int, ...]]:
    """(tile,) where a tile is drawn for the first time, else (tile, how often before)."""
    seen: Counter[int] = Counter()
    drawn: list[tuple[int, ...]] = []
    for index in order:
        drawn.append((index, seen[index]) if seen[index] else (index,))
        seen[index] += 1
    return drawn


@dataclass(frozen=True)
class SeededItem:
    """What became of one tile (or slide).

    Attributes:
        views: the tensors that were made of it; None where nothing at all is readable.
        index: the tile shown; another than the one asked for where that was unreadable.
        unreadable: (index, reason) of each tile that had to be passed over.
    """

    views: dict[str, torch.Tensor] | None
    index: int
    unreadable: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class SeededBatch:
    """The views of a batch, stacked, and what was unreadable on the way to them; views are None where nothing is
    readable."""

    views: dict[str, torch.Tensor] | None
    indices: list[int]
    unreadable: list[tuple[int, str]]

    def pin_memory(self) -> SeededBatch:
        """Copy the views to page-locked memory (a `DataLoader` with `pin_memory=True` calls this)."""
        if self.views is None:
            return self
        pinned = {name: tensor.pin_memory() for name, tensor in self.views.items()}
        return SeededBatch(pinned, self.indices, self.unreadable)


class SeededData(Dataset):
    """What a training reads: views that are a function of the seed and the key of `GlobalBatches` alone.

    What is unreadable is replaced by the next that is readable, so that every batch has its full size. Subclasses
    implement `views`, `name`, `sha256` and `__len__`.

    Args:
        seed: of the views.
        where: the folder or file that the data lies in, for messages.

    Attributes:
        noun: what one of them is called, for messages.
        traits: what `sha256` is made of, for messages.
        counted: what a log counts.
    """

    noun, traits, counted = "tile", "paths, labels, groups or splits", "images"

    def __init__(self, seed: int, where: str):
        self.seed, self.where = seed, where

    def views(self, index: int, seed: int) -> dict[str, Any]:
        """Read one and make its views by draws that depend on `seed` alone (OSError, ValueError: unreadable)."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What a log calls it."""
        raise NotImplementedError

    def sha256(self) -> str:
        """Tells whether two runs saw the same data."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, ...]) -> SeededItem:
        epoch, asked, *again = key
        unreadable = []
        for index in itertools.chain(range(asked, len(self)), range(asked)):
            try:
                views = self.views(index, mixed_seed(self.seed, epoch, index, *again))
            # MemoryError, OverflowError: what resizing raises for a shape that no memory holds.
            except (OSError, ValueError, MemoryError, OverflowError) as error:
                unreadable.append((index, one_line(error)))
                continue
            return SeededItem(views, index, tuple(unreadable))
        # Not raised here: what leaves a worker process as an exception arrives wrapped in a traceback.
        return SeededItem(None, asked, tuple(unreadable))


class SeededTiles(SeededData):
    """Tiles under random views.

    Args:
        tiles: the tiles.
        transform: (PIL RGB image, torch.Generator) -> dict of tensors; draws from that generator alone.
        seed: of the views.
        labels: N class indices; the transform then returns one tensor, and the views are `image` and `label`.
        indexed: the views also hold `index`, the place in `tiles` of the tile that they show.
    """

    def __init__(
        self,
        tiles: LabelledTiles,
        transform: Callable[..., Any],
        seed: int,
        labels: list[int] | None = None,
        indexed: bool = False,
    ):
        super().__init__(seed, str(tiles.root))
        self.tiles, self.transform, self.labels, self.indexed = tiles, transform, labels, indexed
        self.traits = getattr(tiles, "traits", self.traits)

    def __len__(self) -> int:
        return len(self.tiles)

    def name(self, index: int) -> str:
        """The tile's path."""
        return self.tiles.paths[index]

    def sha256(self) -> str:
        """Of the list of tiles."""
        return self.tiles.sha256()

    def views(self, index: int, seed: int) -> dict[str, Any]:
        """The transform of a tile, with its label where there are labels."""
        image = read_tile(self.tiles.root / self.tiles.paths[index])
        views = self.transform(image, torch.Generator().manual_seed(seed))
        views = views if self.labels is None else {"image": views, "label": self.labels[index]}
        return {**views, "index": index} if self.indexed else views


def collate_seeded(
    items: list[SeededItem], stack: Callable[[list[dict[str, Any]]], dict[str, Any]] = default_collate
) -> SeededBatch:
    """Stack a batch (the `collate_fn` of a `DataLoader` over `SeededData`).

    Args:
        items: what `SeededData` gave.
        stack: joins the views of several; the default stacks tensors of one shape.
    """
    views = [item.views for item in items if item.views is not None]
    return SeededBatch(
        views=stack(views) if len(views) == len(items) else None,
        indices=[item.index for item in items],
        unreadable=[bad for item in items for bad in item.unreadable],
    )
