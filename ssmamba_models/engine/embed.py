"""A folder of tiles in, one file of features out."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ssmamba_models.data.batches import read_batches
from ssmamba_models.data.hdf5 import require_h5py
from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.tile_files import FeatureWriter, write_features
from ssmamba_models.data.tiles import TileDataset, TileFolder, collate_tiles
from ssmamba_models.engine.encoder import Encoder, load_encoder
from ssmamba_models.engine.processes import default_workers
from ssmamba_models.engine.short_memory import out_of_memory
from ssmamba_models.output import check_output
from ssmamba_models.progress import progress_bar
from ssmamba_models.threads import threaded


@dataclass(frozen=True)
class EmbedSummary:
    """What `embed_folder` did.

    Attributes:
        out: the file written.
        count: N, the number of tiles in it.
        embed_dim: D, the length of a feature.
        unreadable: (path, reason) of each tile that could not be read and is not in the file.
        seconds: time from the first batch asked for to the file in place, the model's creation excluded.
        tiles_per_second: `count / seconds`.
    """

    out: Path
    count: int
    embed_dim: int
    unreadable: list[tuple[str, str]]
    seconds: float
    tiles_per_second: float


@threaded
def embed_folder(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    model: str = "ssmamba_small",
    *,
    pretrained: bool = False,
    checkpoint: str | os.PathLike | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    img_size: int | None = None,
    pool: str = "model",
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> EmbedSummary:
    """Embed all tiles of a folder into one HDF5 file (see `ssmamba_models.data.tile_files` for its layout).

    Tiles are resized, cropped and normalised as the model's own configuration says. A tile that cannot be
    read is reported and left out. What can fail early (folder, output, model) is checked before the run.

    Args:
        folder: tiles, nested, flat, or listed in a manifest.csv; see `read_tiles` for what is a tile and a label.
        out: the file to write; its folder must exist. Written whole or not at all.
        model: a name of this zoo or any timm name.
        pretrained, checkpoint, device, precision, img_size, seed, pool: as `load_encoder`.
        batch_size: tiles per forward pass.
        workers: processes that decode tiles ahead; 0 decodes in this one, None chooses by the machine.
        threads: CPU threads; None takes the cores that this process may use (see `threads.use_threads`).
        overwrite: replace an existing `out`.
        progress: draw a progress bar on stderr.

    Returns:
        What was done, and which tiles were unreadable.

    Raises:
        ValueError: no tile, no readable tile, a bad manifest, an unknown model, an impossible size, or features
            that are not finite.
        FileExistsError: `out` exists and `overwrite` is False.
        OSError: the folder or the output is not usable, or a worker process died.
        ImportError: h5py is missing.
    """
    _check_counts(batch_size=(batch_size, 1), workers=(workers, 0), img_size=(img_size, 1))
    require_h5py()
    check_output(out, overwrite)
    tiles = read_tiles(folder)
    encoder = load_encoder(
        model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        img_size=img_size,
        pool=pool,
        seed=seed,
    )
    return embed_tiles(
        tiles, encoder, out, batch_size=batch_size, workers=workers, overwrite=overwrite, progress=progress
    )


def embed_tiles(
    tiles: TileFolder,
    encoder: Encoder,
    out: str | os.PathLike,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    attributes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    title: str = "embed",
) -> EmbedSummary:
    """Embed tiles that were found into one HDF5 file, with an encoder that was made.

    Args:
        tiles: the tiles.
        encoder: what computes the features; its provenance becomes the file's attributes.
        attributes: more attributes for the file.
        title: what the progress bar is called.
        out, batch_size, workers, overwrite, progress: as `embed_folder`.

    Returns:
        What was done, and which tiles were unreadable.

    Raises:
        ValueError, OSError, ImportError: as `embed_folder`.
    """
    _check_counts(batch_size=(batch_size, 1), workers=(workers, 0))
    loader = _loader(tiles, encoder, batch_size, workers)
    labelled, attributes = tiles.labels is not None, {**encoder.provenance(), **(attributes or {})}
    start = time.perf_counter()
    with (
        progress_bar(title, "tile", progress, total=len(tiles)) as bar,
        write_features(out, encoder.embed_dim, labelled=labelled, attributes=attributes, overwrite=overwrite) as writer,
    ):
        unreadable = _embed_into(writer, tiles, encoder, loader, bar)
    seconds = time.perf_counter() - start
    return EmbedSummary(Path(out), writer.count, encoder.embed_dim, unreadable, seconds, writer.count / seconds)


def _check_counts(**counts: tuple[int | None, int]) -> None:
    for name, (value, least) in counts.items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, expected {least} or more")


def _loader(tiles: TileFolder, encoder: Encoder, batch_size: int, workers: int | None) -> DataLoader:
    batches = -(-len(tiles) // batch_size)
    return DataLoader(
        TileDataset(tiles, encoder.transform),
        batch_size=batch_size,
        collate_fn=collate_tiles,
        # A process without a batch to decode costs its start and nothing else.
        num_workers=min(default_workers(encoder.device, 1) if workers is None else workers, batches),
        pin_memory=encoder.device.type == "cuda",
    )


def _embed_into(
    writer: FeatureWriter, tiles: TileFolder, encoder: Encoder, loader: DataLoader, bar: tqdm
) -> list[tuple[str, str]]:
    unreadable = []
    for batch in read_batches(loader, "decodes tiles"):
        unreadable += [(tiles.paths[index], reason) for index, reason in batch.unreadable]
        if batch.images is not None:
            _embed_batch(writer, tiles, encoder, batch.images, batch.indices)
        bar.update(len(batch.indices) + len(batch.unreadable))
    if writer.count == 0:
        path, reason = unreadable[0]
        raise ValueError(
            f"none of the {len(tiles)} tiles in {str(tiles.root)!r} is readable (first: {path}: {reason}); "
            "nothing was written"
        )
    return unreadable


def _embed_batch(
    writer: FeatureWriter, tiles: TileFolder, encoder: Encoder, images: torch.Tensor, indices: list[int]
) -> None:
    try:
        features = encoder.embed(images)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise ValueError(
            f"a batch of {len(images)} tiles does not fit into the memory of {encoder.device}; "
            "use a smaller --batch-size"
        ) from error
    paths = [tiles.paths[index] for index in indices]
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        first = paths[int(finite.logical_not().nonzero()[0])]
        raise ValueError(
            f"{encoder.name} returns features that are not finite (first tile: {first}); "
            "check the weights, or use --precision fp32"
        )
    labels = [tiles.labels[index] for index in indices] if tiles.labels is not None else None
    writer.append(features.numpy(), paths, labels)
