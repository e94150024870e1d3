"""Attention over a slide: a picture, and polygons for QuPath."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssmamba_models.data.features import read_slide_features
from ssmamba_models.data.tile_geometry import TileGeometry
from ssmamba_models.engine.mil_predict import TileScores, score_tiles
from ssmamba_models.output import check_output
from ssmamba_models.threads import threaded
from ssmamba_models.wsi.contours import polygon_feature, write_geojson
from ssmamba_models.wsi.drawing import write_thumbnail
from ssmamba_models.wsi.reader import open_slide

# Features written from a slide say its size; a slide may be opened by another library that crops a few pixels.
_SIZE_TOLERANCE = 0.01
_CLASS_COLOR = (33, 145, 140)


@dataclass(frozen=True)
class Heatmap:
    """What `draw_heatmap` wrote.

    Attributes:
        png, geojson: the two files.
        scores: of the tiles, and the slide's prediction.
    """

    png: Path
    geojson: Path
    scores: TileScores


@threaded
def draw_heatmap(
    run: str | os.PathLike,
    features: str | os.PathLike,
    out: str | os.PathLike,
    *,
    slide: str | os.PathLike | None = None,
    max_size: int = 2048,
    opacity: float = 0.5,
    precision: str = "fp32",
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> Heatmap:
    """Draw how much each tile of a slide counts for its prediction.

    Writes OUT/<name>.png, the thumbnail with the tiles coloured by the rank of their attention (dark least, yellow
    most), and OUT/<name>.geojson, one polygon per tile with its attention and rank, in level-0 pixels as QuPath counts
    them: from where the scanned area begins, if the slide, or without it the feature file, says so.

    Args:
        run: a run folder of `train_mil`, or a weights file in it.
        features: the slide's feature file.
        out: folder for the two files; made if missing, its parent must exist.
        slide: the slide itself; without it the tiles are drawn on white.
        max_size: longer side of the picture in pixels.
        opacity: of the colours over the slide, 0 to 1.
        precision, device: as `predict_mil`.
        threads: CPU threads; None takes the cores that this process may use (see `threads.use_threads`).
        overwrite: whether existing files may be replaced.

    Returns:
        The files and the scores.

    Raises:
        ValueError: the features do not fit the model or the slide, or an argument is out of range.
        FileNotFoundError, FileExistsError, OSError: something to read is not there, or the files cannot be written.
        ImportError: an optional package is missing; the message names the extra.
    """
    if not 0 <= opacity <= 1 or max_size < 1:
        raise ValueError(f"opacity is {opacity} and max_size {max_size}; expected 0 to 1, and 1 or more")
    file = read_slide_features(features, features=False)
    folder = _folder(out)
    png, geojson = (check_output(folder / f"{Path(features).stem}{end}", overwrite) for end in (".png", ".geojson"))
    image, downsample, origin = _background(file, slide, max_size)
    scores = score_tiles(run, features, precision=precision, device=device)
    ranks = attention_ranks(scores.attention)
    picture = color_tiles(image, downsample, file.coords, file.patch_size_level0, ranks, opacity)
    write_thumbnail(png, picture, overwrite)
    collection = tiles_geojson(file.coords, file.patch_size_level0, scores.attention, origin)
    write_geojson(geojson, collection, overwrite)
    return Heatmap(png, geojson, scores)


def attention_ranks(attention: np.ndarray) -> np.ndarray:
    """Ranks of the tiles from 0 (least) to 1 (most), equal ones sharing the mean of theirs.

    Attention falls off so steeply that drawn as it is it would show one tile in thousands.

    Shape: (N,) -> (N,) float64; 1 where there is one tile.
    """
    if len(attention) == 1:
        return np.ones(1)
    values, inverse, counts = np.unique(attention, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    middle = last - (counts - 1) / 2
    return (middle / (len(attention) - 1))[inverse] if len(values) > 1 else np.full(len(attention), 0.5)


def color_tiles(
    image: np.ndarray, downsample: float, coords: np.ndarray, side: float, values: np.ndarray, opacity: float = 0.5
) -> Image.Image:
    """Colour tiles over a thumbnail; where tiles overlap, the mean of their values.

    Args:
        image: (h, w, 3) uint8.
        downsample: level-0 px per px of it.
        coords: (N, 2) level-0 px, top-left corners.
        side: of a tile, level-0 px.
        values: (N,), 0 to 1.
        opacity: of the colours.

    Returns:
        The picture, RGB, of the thumbnail's size.

    Raises:
        ImportError: matplotlib is missing.
    """
    sums, counts = np.zeros(image.shape[:2]), np.zeros(image.shape[:2])
    # Corners are rounded pixels, so the next tile may begin one later than this one ends: that is no gap.
    edges = np.round(np.concatenate((coords, coords + side + 1), axis=1) / downsample).astype(int)
    for (left, top, right, bottom), value in zip(edges.clip(min=0), values):
        # A tile smaller than a pixel still shows.
        place = np.s_[top : max(bottom, top + 1), left : max(right, left + 1)]
        sums[place] += value
        counts[place] += 1
    covered = counts > 0
    colours = _colormap()(sums[covered] / counts[covered])[:, :3] * 255
    picture = image.astype(np.float64)
    picture[covered] = (1 - opacity) * picture[covered] + opacity * colours
    return Image.fromarray(picture.round().astype(np.uint8))


def tiles_geojson(
    coords: np.ndarray, side: float, attention: np.ndarray, origin: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """A GeoJSON feature collection with one square per tile, in level-0 pixels, coloured by rank.

    QuPath lists "attention" (N times the tile's share: 1 is the mean tile's) and "rank" (0 to 1) with each, and can
    colour by them.

    Args:
        coords: (N, 2) level-0 px, top-left corners.
        side: of a tile, level-0 px.
        attention: (N,), sum 1.
        origin: (x, y) in level-0 px that is taken off, as in `wsi.contours.contours_geojson`.
    """
    ranks = attention_ranks(attention)
    colours = (_colormap()(ranks)[:, :3] * 255).round().astype(int).tolist()
    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) * float(side) - origin
    features = []
    for corner, weight, rank, colour in zip(coords, attention, ranks, colours):
        measurements = {"attention": float(weight) * len(attention), "rank": float(rank)}
        feature = polygon_feature([corner + square], "Attention", _CLASS_COLOR, measurements)
        # QuPath has one colour for a class, and one for each object that has its own; it shows many tiles fast.
        feature["properties"] |= {"objectType": "tile", "color": colour}
        features.append(feature)
    return {"type": "FeatureCollection", "features": features}


def _folder(out: str | os.PathLike) -> Path:
    folder = Path(out)
    if folder.is_file():
        raise NotADirectoryError(f"the output {str(folder)!r} is a file; name a folder for the heatmap")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(folder.parent)!r} does not exist; create it (mkdir -p)")
    folder.mkdir(exist_ok=True)
    return folder


def _background(
    file: TileGeometry, slide: str | os.PathLike | None, max_size: int
) -> tuple[np.ndarray, float, tuple[int, int]]:
    """The picture to draw on, (h, w, 3) uint8, level-0 px per px of it, and where the scanned area begins."""
    width, height = file.level0_width, file.level0_height
    if slide is None:
        downsample = max(1.0, max(width, height) / max_size)
        shape = (round(height / downsample) or 1, round(width / downsample) or 1, 3)
        return np.full(shape, 255, np.uint8), downsample, file.origin
    with open_slide(slide, mpp_override=file.level0_mpp) as opened:
        if any(abs(a - b) > _SIZE_TOLERANCE * b for a, b in zip(opened.dimensions, (width, height))):
            raise ValueError(
                f"the slide {os.fspath(slide)!r} is {opened.dimensions[0]} x {opened.dimensions[1]} px, but the "
                f"features come from one of {width} x {height} px ({file.name!r}); give that one"
            )
        return *opened.thumbnail(max_size), opened.origin


def _colormap() -> Any:
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise ImportError(f'heatmaps need matplotlib ({error}); pip install "ssmamba-models[mil]"') from error
    return colormaps["viridis"]
