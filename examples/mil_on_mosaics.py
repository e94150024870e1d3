"""How well aggregators find a few tumour tiles in slides assembled from real tiles: the AUC of each, with an interval.

python examples/mil_on_mosaics.py --quick --out mosaics                # synthetic tiles, a tiny model: a minute
python examples/mil_on_mosaics.py --data lc25000 --features tiles.h5 --out mosaics

Slides are mosaics of --normal tiles; in positive ones 5 to 10 % of the tiles are --tumour tiles, scattered. A patient's
tiles come from groups that no other patient has, and folds are by patient. --features is what `ssmamba embed` wrote of
the data; without it the tiles are embedded first. OUT/aucs.md holds the table, OUT/<aggregator>/ each one's report and
weights, and OUT/heatmap/attention.jpg one positive slide. What is done is kept: the same line again goes on.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ssmamba_models.data.labelled import LabelledTiles, read_tiles
from ssmamba_models.data.mosaic_files import LABELS, draw_mosaic, remember_mosaics, write_mosaic_features
from ssmamba_models.data.mosaics import MosaicKind, assemble_mosaics
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.data.tile_files import read_features
from ssmamba_models.engine.embed import embed_folder
from ssmamba_models.engine.mil import PREDICTIONS, train_mil
from ssmamba_models.engine.mil_config import MilConfig
from ssmamba_models.engine.mil_model import WEIGHTS
from ssmamba_models.engine.mil_predict import score_tiles
from ssmamba_models.engine.mil_predictions import read_predictions
from ssmamba_models.evaluation.heatmap import draw_heatmap
from ssmamba_models.evaluation.mil_report import report_mil

AGGREGATORS = ("mean", "max", "abmil", "clam", "dsmil", "transmil", "mambamil")
# At 512 channels a step of these takes seconds of a CPU; every other argument is the default.
NARROW = {"transmil": {"hidden_dim": 128}, "mambamil": {"dim": 128}}

MADE_OF = ("data", "features", "model", "img_size", "normal", "tumour", "patients", "cells", "seed")
# Of a picture, and between two of them, in pixels.
SIDE, GAP = 480, 16


def tiles_and_features(arguments) -> tuple[LabelledTiles, np.ndarray, dict]:
    """The tiles, their features (N, D) in the same order, and where these come from."""
    file = arguments.features or arguments.out / "tiles.h5"
    data = arguments.data or arguments.out / "tiles"
    if arguments.quick and not data.exists():
        write_synthetic_tiles(data, tiles_per_kind=40, size=64)
    if not file.exists():
        embed_folder(data, file, arguments.model, pretrained=not arguments.quick, img_size=arguments.img_size)
    stored, tiles = read_features(file), read_tiles(data)
    place = {path: row for row, path in enumerate(stored.paths)}
    tiles = tiles.subset(index for index, path in enumerate(tiles.paths) if path in place)
    return tiles, stored.features[[place[path] for path in tiles.paths]], stored.attributes


def assemble(arguments):
    """Write the slides, once; returns them and their tiles."""
    remember_mosaics(arguments.out, {name: getattr(arguments, name) for name in MADE_OF})
    tiles, features, attributes = tiles_and_features(arguments)
    kinds = {
        "negative": MosaicKind({arguments.normal: None}),
        "positive": MosaicKind({arguments.normal: None, arguments.tumour: (0.05, 0.1)}),
    }
    shape = (arguments.cells, arguments.cells)
    mosaics = assemble_mosaics(tiles, kinds, patients=arguments.patients, shape=shape, seed=arguments.seed)
    folder = arguments.out / "slides"
    if not (folder / LABELS).exists():
        write_mosaic_features(mosaics, features, attributes, folder)
    return mosaics, tiles, folder


def score(name, folder, arguments):
    """Cross-validate one aggregator; returns its report."""
    config = MilConfig(
        features=str(folder),
        labels=str(folder / LABELS),
        aggregator=name,
        aggregator_args=NARROW.get(name, {}),
        epochs=arguments.epochs,
        lr=arguments.lr,
        batch_size=4,
        folds=arguments.folds,
        seed=arguments.seed,
    )
    train_mil(config, arguments.out / name, resume=True, progress=False)
    return report_mil(arguments.out / name)


def attention(name, mosaic, folder, arguments):
    """(N,) attention of a slide's tiles, by the fold that was not trained on it; and that fold's weights."""
    run = arguments.out / name
    fold = next(row.fold for row in read_predictions(run / PREDICTIONS)[0] if row.slide == mosaic.name)
    weights = run / f"fold-{fold}" / WEIGHTS
    return score_tiles(weights, folder / f"{mosaic.name}.h5").attention, weights


def is_tumour(mosaic, tiles, arguments):
    return np.array([tiles.labels[index] == arguments.tumour for index in mosaic.tiles.reshape(-1)])


def found(name, mosaics, tiles, folder, arguments):
    """Share of tumour among the tiles with most attention, as many of each positive slide as it has tumour tiles."""
    hits = []
    for mosaic in mosaics:
        if mosaic.label == "positive":
            tumour = is_tumour(mosaic, tiles, arguments)
            most = np.argsort(-attention(name, mosaic, folder, arguments)[0], kind="stable")[: tumour.sum()]
            hits.append(tumour[most])
    return np.concatenate(hits).mean()


def draw(name, mosaics, tiles, folder, arguments):
    """A positive slide: its tumour tiles framed, and the attention of an aggregator that was not trained on it."""
    mosaic = next(mosaic for mosaic in mosaics if mosaic.label == "positive")
    out = arguments.out / "heatmap"
    out.mkdir(exist_ok=True)
    slide = out / f"{mosaic.name}_slide.png"
    picture = draw_mosaic(mosaic, tiles)
    picture.save(slide)
    _, weights = attention(name, mosaic, folder, arguments)
    drawn = draw_heatmap(
        weights, folder / f"{mosaic.name}.h5", out, slide=slide, max_size=SIDE, opacity=0.7, overwrite=True
    )
    heat = Image.open(drawn.png)
    picture = picture.resize(heat.size)
    tumour = is_tumour(mosaic, tiles, arguments).reshape(mosaic.tiles.shape)
    side, pen = heat.width / tumour.shape[1], ImageDraw.Draw(picture)
    for row, column in np.argwhere(tumour):
        x, y = column * side, row * side
        pen.rectangle((x, y, x + side - 1, y + side - 1), outline="cyan", width=3)
    both = Image.new("RGB", (2 * heat.width + GAP, heat.height), "white")
    both.paste(picture, (0, 0))
    both.paste(heat, (heat.width + GAP, 0))
    both.save(out / "attention.jpg", quality=85)
    print(f"{out / 'attention.jpg'}: framed are {arguments.tumour}; the attention is of {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="labelled tiles, with groups if possible")
    parser.add_argument("--features", type=Path, help="HDF5 file of `ssmamba embed`; made if not given")
    parser.add_argument("--model", default="ssmamba_small", help="to embed with; default: %(default)s")
    parser.add_argument("--img-size", type=int, default=96, help="to embed at; default: %(default)s")
    parser.add_argument("--normal", default="lung_n", help="class of the tissue; default: %(default)s")
    parser.add_argument("--tumour", default="lung_aca", help="class of the few tiles; default: %(default)s")
    parser.add_argument("--patients", type=int, default=60, help="with two slides each; default: %(default)s")
    parser.add_argument("--cells", type=int, default=12, help="tiles along a slide's side; default: %(default)s")
    parser.add_argument("--aggregators", nargs="+", default=list(AGGREGATORS), help="default: %(default)s")
    parser.add_argument("--drawn", help="aggregator of the picture; default: the last one")
    parser.add_argument("--folds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-4, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder of the slides, the runs and the table")
    parser.add_argument("--quick", action="store_true", help="synthetic tiles, a tiny model with random weights")
    arguments = parser.parse_args()
    if not arguments.quick and not arguments.data:
        parser.error("give --data FOLDER, or --quick to look at synthetic tiles")
    if arguments.quick:
        arguments.data, arguments.model, arguments.img_size = None, "test_ssmamba", 64
        arguments.normal, arguments.tumour, arguments.patients, arguments.cells = "stroma", "solid", 12, 6
        arguments.aggregators, arguments.folds, arguments.epochs = ["mean", "abmil"], 3, 6
    arguments.out.mkdir(parents=True, exist_ok=True)
    mosaics, tiles, folder = assemble(arguments)
    head = "| aggregator | AUC (95 %) | macro-F1 (95 %) | tumour among the tiles read most |"
    lines = [head, "| --- | --- | --- | --- |"]
    for name in arguments.aggregators:
        metrics = score(name, folder, arguments)["metrics"]
        cells = [f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f})" for m in (metrics["auc"], metrics["macro_f1"])]
        share = f"{found(name, mosaics, tiles, folder, arguments):.0%}"
        lines.append(f"| {name} | {' | '.join([*cells, share])} |")
        print(lines[-1], flush=True)
    (arguments.out / "aucs.md").write_text("\n".join([*lines, ""]))
    draw(arguments.drawn or arguments.aggregators[-1], mosaics, tiles, folder, arguments)


if __name__ == "__main__":
    main()
