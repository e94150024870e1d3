"""A folder of tiles: which files are tiles, what their labels are, and a data set that reads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from ssmamba_models.data.folder_walk import walk_folder
from ssmamba_models.data.rgb import to_rgb
from ssmamba_models.notice import one_line

TILE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})

# Files that tell a folder which this package wrote: a run, a report, a job of extraction. Its pictures are no tiles.
_WRITTEN = (
    {"config.yaml", "log.jsonl"},
    {"report.json", "report.md"},
    {"config.yaml", "status.jsonl", "thumbnails"},
)


@dataclass(frozen=True)
class TileFolder:
    """The tiles of a folder.

    Attributes:
        root: the folder.
        paths: the N tiles, relative to `root`, with forward slashes, sorted.
        labels: N class names, or None where the folder does not name classes.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.paths)


def find_tiles(folder: str | os.PathLike) -> TileFolder:
    """Find the tiles in a folder, at any depth.

    A tile is a png, jpg, jpeg, tif, tiff, bmp or webp file (in upper or lower case). Hidden files and folders
    are skipped, and so are the runs, reports and extraction jobs that this package wrote below `folder`. Links to
    folders are followed, each folder being listed once, by its own name rather than a link's. Where *every* tile lies
    in a folder of its own class directly under `folder` (`folder/tumour/a.png`, `folder/tumour/case1/b.png`), that
    folder's name is its label; a single tile beside the class folders means that the folder names no classes.

    Args:
        folder: the folder to look in.

    Returns:
        The tiles, sorted by path, so that two calls agree on every machine.

    Raises:
        FileNotFoundError: the folder does not exist.
        NotADirectoryError: the path is a file.
        ValueError: no tile is in the folder.
        OSError: a folder in it cannot be listed.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"the folder of tiles {str(root)!r} does not exist; check its spelling")
    if not root.is_dir():
        raise NotADirectoryError(f"{str(root)!r} is a file; give the folder that holds the tiles")
    paths = tuple(sorted(_tile_paths(root)))
    if not paths:
        raise ValueError(
            f"no tile found in {str(root)!r} or below; looked for {', '.join(sorted(TILE_SUFFIXES))} "
            "and skipped hidden files and folders"
        )
    return TileFolder(root, paths, _class_labels(paths))


def _tile_paths(root: Path) -> Iterator[str]:
    def is_written(folder: Path, names: Set[str]) -> bool:
        return folder != root and any(written <= names for written in _WRITTEN)

    for folder, names in walk_folder(root, skip=is_written):
        prefix = "/".join((*folder.relative_to(root).parts, ""))
        for name in names:
            if os.path.splitext(name)[1].lower() in TILE_SUFFIXES:
                yield prefix + name


def _class_labels(paths: tuple[str, ...]) -> tuple[str, ...] | None:
    if all("/" in path for path in paths):
        return tuple(path.split("/", 1)[0] for path in paths)
    return None


@dataclass(frozen=True)
class Tile:
    """One tile as read: its transformed image, or the reason why there is none.

    Attributes:
        index: the tile's place in `TileFolder.paths`.
        image: what the transform made of the RGB image, usually (3, H, W) float32; None where unreadable.
        reason: one line that says why the tile is unreadable; empty where it is readable.
    """

    index: int
    image: torch.Tensor | None
    reason: str = ""


@dataclass(frozen=True)
class TileBatch:
    """The readable tiles of a batch, stacked, and the unreadable ones.

    Attributes:
        images: (B, 3, H, W), B being the number of readable tiles; None where there is none.
        indices: B places in `TileFolder.paths`.
        unreadable: (place, reason) of each tile that could not be read.
    """

    images: torch.Tensor | None
    indices: list[int]
    unreadable: list[tuple[int, str]]

    def pin_memory(self) -> TileBatch:
        """Copy the images to page-locked memory (a `DataLoader` with `pin_memory=True` calls this)."""
        if self.images is None:
            return self
        return TileBatch(self.images.pin_memory(), self.indices, self.unreadable)


class TileDataset(torch.utils.data.Dataset):
    """The tiles of a folder, read as RGB and transformed.

    A tile that cannot be read or resized does not raise: it comes back as a `Tile` with a reason, so that one bad file
    never stops a run over a million good ones.

    Args:
        tiles: what `find_tiles` returned.
        transform: turns a PIL image of mode RGB into a tensor, for example timm's `create_transform(...)`.
    """

    def __init__(self, tiles: TileFolder, transform: Callable[[Image.Image], torch.Tensor]):
        self.tiles = tiles
        self.transform = transform

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> Tile:
        path = self.tiles.paths[index]
        try:
            image = read_tile(self.tiles.root / path)
        except (OSError, ValueError) as error:
            return Tile(index, None, getattr(error, "strerror", None) or str(error))
        try:
            return Tile(index, self.transform(image))
        # What resizing raises for a shape that no memory holds (1 x 100000 px to 224 px on the short side).
        # Other exceptions are faults of the transform, not of the tile, and must be seen.
        except (OSError, ValueError, MemoryError, OverflowError) as error:
            width, height = image.size
            return Tile(index, None, f"an image of {width} x {height} px cannot be transformed ({one_line(error)})")


def read_tile(path: str | os.PathLike) -> Image.Image:
    """Read one tile as an RGB image.

    Args:
        path: the image file.

    Returns:
        A PIL image of mode RGB, fully decoded.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is not an image, is truncated or corrupt, has a mode without a defined conversion
            to RGB, or its name cannot be stored as text. The message is one line.
    """
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("the file's name is not valid UTF-8; rename it") from error
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(_not_an_image(path)) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(one_line(error)) from error
    # Broken files make Pillow's decoders raise SyntaxError, struct.error, EOFError, IndexError and others.
    except Exception as error:
        raise ValueError(one_line(error)) from error


def _not_an_image(path: str | os.PathLike) -> str:
    if os.path.getsize(path) == 0:
        return "the file is empty"
    return "not an image that Pillow can read (corrupt header, or a format it does not know)"


def collate_tiles(items: list[Tile]) -> TileBatch:
    """Stack the readable tiles of a batch (the `collate_fn` of a `DataLoader` over a `TileDataset`).

    Args:
        items: the tiles of the batch; their images must have one shape.

    Returns:
        The stacked images and, apart, what could not be read.
    """
    images = [item.image for item in items if item.image is not None]
    return TileBatch(
        images=torch.stack(images) if images else None,
        indices=[item.index for item in items if item.image is not None],
        unreadable=[(item.index, item.reason) for item in items if item.image is None],
    )
