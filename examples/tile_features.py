"""A folder of tiles to an HDF5 file of features, and to a picture of nearest neighbours.

python examples/tile_features.py [--folder tiles] [--model ssmamba_tiny] [--pretrained] [--out out]

Without --folder a few synthetic H&E tiles are drawn. Each row of the picture is one tile and, to its right, the
tiles whose features are most similar to its own.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.data.tile_files import read_features
from ssmamba_models.data.tiles import read_tile
from ssmamba_models.engine.embed import embed_folder


def nearest(features, query, count):
    """The indices of the rows most similar to one of them (cosine of centred features), itself first."""
    centred = features - features.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)
    return np.argsort(-(unit @ unit[query]), kind="stable")[: count + 1]


def choose_queries(labels, count):
    """The first tile of each class, or tiles spread over the folder where there are no classes."""
    if labels is None:
        return list(dict.fromkeys(np.linspace(0, count - 1, 4).astype(int)))
    return [labels.index(name) for name in sorted(set(labels))]


def draw(folder, read, neighbours=5, side=160, gap=8):
    """One row per query: the tile, a wider gap, its neighbours."""
    queries = choose_queries(read.labels, len(read.paths))
    width = (neighbours + 1) * (side + gap) + 3 * gap
    sheet = Image.new("RGB", (width, len(queries) * (side + gap) + gap), "white")
    for row, query in enumerate(queries):
        for column, index in enumerate(nearest(read.features, query, neighbours)):
            tile = read_tile(folder / read.paths[index]).resize((side, side))
            left = gap + column * (side + gap) + (2 * gap if column else 0)
            sheet.paste(tile, (left, gap + row * (side + gap)))
    return sheet


def agreement(read):
    """The share of tiles whose nearest neighbour is of their own class."""
    hits = [read.labels[nearest(read.features, i, 1)[-1]] == label for i, label in enumerate(read.labels)]
    return np.mean(hits)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="tiles, nested or flat; class folders become labels")
    parser.add_argument("--model", default="ssmamba_tiny", help="ours, or any timm name; default: %(default)s")
    parser.add_argument("--pretrained", action="store_true", help="use the model's published weights")
    parser.add_argument("--checkpoint", help="use these weights; without either they are random")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the two files; default: this one")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or write_synthetic_tiles(scratch, tiles_per_kind=12)
        summary = embed_folder(
            folder,
            arguments.out / "tile_features.h5",
            model=arguments.model,
            pretrained=arguments.pretrained,
            checkpoint=arguments.checkpoint,
            overwrite=True,
        )
        read = read_features(summary.out)
        draw(folder, read).save(arguments.out / "tile_neighbours.png")
    print(f"{summary.count} tiles x {summary.embed_dim} features at {summary.tiles_per_second:.1f} tiles/s")
    if read.labels is not None:
        print(f"nearest neighbour of the same class: {agreement(read):.0%}")
    print(f"wrote {summary.out} and {arguments.out / 'tile_neighbours.png'}")


if __name__ == "__main__":
    main()
