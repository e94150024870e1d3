"""What SGCL takes for alike and for different: tiles, their spatial and propagated positives, their hard negatives.

python examples/sgcl_positives.py [--run RUN] [--data MANIFEST] [--out sgcl_positives.jpg]

RUN is a folder of `ssmamba pretrain --method sgcl`; the sets are those that its last checkpoint would go on with.
Without it a tiny model is trained on synthetic slides, which takes half a minute. Each row shows a tile, then some of
its positives of both kinds and of its hard negatives, drawn at random. Where tiles have labels, a frame tells whether
they are of the first tile's tissue (green) or of another (red; grey: "unlabelled"), and the script prints how often
that is so over all tiles.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.mosaic_files import write_mosaic_tiles
from ssmamba_models.data.mosaics import MosaicKind, assemble_mosaics
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.engine.checkpoints import Checkpoints
from ssmamba_models.engine.config import load_config
from ssmamba_models.engine.pretrain import PretrainConfig, build, pretrain, select_tiles

TITLES = {"near": "spatial positives", "propagated": "propagated positives", "hard": "hard negatives"}
SAME, OTHER, PLAIN = (0, 150, 60), (215, 30, 30), (120, 120, 120)
GAP, BAND = 10, 16
# As examples/sgcl_ablation.py calls the tissue of a real slide's tiles.
UNLABELLED = "unlabelled"


def train_on_synthetic_slides(folder):
    """A tiny run; returns its folder."""
    tiles = read_tiles(write_synthetic_tiles(folder / "tiles", tiles_per_kind=24, size=64))
    kinds = {"slide": MosaicKind({"stroma": 0.5, "glands": None}, "regions")}
    mosaics = assemble_mosaics(tiles, kinds, patients=4, slides_per_patient=1, shape=(6, 6))
    data = write_mosaic_tiles(mosaics, tiles, folder / "slides").parent
    config = PretrainConfig(
        method="sgcl", data=str(data), model="test_ssmamba", img_size=64, epochs=3, batch_size=16, workers=0
    )
    pretrain(config, folder / "run", progress=False)
    return folder / "run"


def read_run(run, data):
    """The module of a run as its last checkpoint left it, and the tiles that it was trained on."""
    config = load_config(PretrainConfig, run / "config.yaml")
    if config.method != "sgcl":
        raise SystemExit(f"{run} was trained by {config.method}; expected a run of --method sgcl")
    config = replace(config, data=str(data or config.data))
    tiles = select_tiles(config)
    state = Checkpoints(run / "checkpoints").load(print)
    if state is None:
        raise SystemExit(f"{run} holds no checkpoint; the banks are in no other file")
    module, _ = build(config, tiles)
    module.load_state_dict(state["module"])
    return module.eval(), tiles


def mine(module, size, batch=256):
    """Of each kind a list of arrays: the tiles that are of it, for each tile (a hard negative may be there twice)."""
    sets = {kind: [] for kind in TITLES}
    for index in torch.arange(size).split(batch):
        for kind, (found, valid) in module.mine(index).items():
            sets[kind] += [row[kept].numpy() for row, kept in zip(found, valid)]
    return sets


def print_shares(sets, labels):
    """How often the members of each kind are of the tile's own tissue; tiles of no known tissue are left out."""
    known = labels != UNLABELLED
    chance = np.mean([np.mean(labels[known] == label) for label in labels[known]])
    print(f"same tissue, of any two tiles: {chance:.1%}")
    for kind, members in sets.items():
        pairs = [(found[known[found]], label) for found, label in zip(members, labels) if label != UNLABELLED]
        if not sum(len(found) for found, _ in pairs):
            print(f"{TITLES[kind]}: none")
            continue
        same = np.concatenate([labels[found] == label for found, label in pairs])
        count = np.mean([len(np.unique(found)) for found, _ in pairs])
        print(f"{TITLES[kind]}: {count:.1f} of a tile, {same.mean():.1%} of its tissue")


def choose_anchors(sets, labels, count, rng):
    """Tiles that have members of all kinds, of different tissues as far as there are."""
    whole = np.array([all(map(len, members)) for members in zip(*sets.values())]) & (labels != UNLABELLED)
    if not whole.any():
        raise SystemExit("no tile has positives of both kinds; train longer, or with intra and inter")
    order = rng.permutation(np.flatnonzero(whole))
    seen = dict.fromkeys(labels.tolist(), 0)
    ranks = []
    for tile in order:
        ranks.append(seen[labels[tile]])
        seen[labels[tile]] += 1
    return order[np.argsort(ranks, kind="stable")[:count]]


def read_picture(tiles, place, side, color):
    """A tile with a frame."""
    with Image.open(tiles.root / tiles.paths[place]) as image:
        picture = image.convert("RGB").resize((side, side))
    ImageDraw.Draw(picture).rectangle((0, 0, side - 1, side - 1), outline=color, width=3)
    return picture


def draw(sets, anchors, tiles, labels, arguments, rng):
    side, shown = arguments.side, arguments.shown
    starts = [side + GAP + number * (shown * side + GAP) for number in range(len(TITLES))]
    picture = Image.new("RGB", (starts[-1] + shown * side, BAND + len(anchors) * (side + GAP) - GAP), "white")
    titles = ImageDraw.Draw(picture)
    for left, title in zip([0, *starts], ["tile", *TITLES.values()]):
        titles.text((left + 2, 2), title, fill="black")
    for number, anchor in enumerate(anchors):
        top = BAND + number * (side + GAP)
        picture.paste(read_picture(tiles, anchor, side, PLAIN), (0, top))
        for left, kind in zip(starts, TITLES):
            members = np.unique(sets[kind][anchor])
            for column, place in enumerate(rng.permutation(members)[:shown]):
                frame = SAME if labels[place] == labels[anchor] else OTHER
                frame = PLAIN if tiles.labels is None or labels[place] == UNLABELLED else frame
                picture.paste(read_picture(tiles, place, side, frame), (left + column * side, top))
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of an SGCL run; without it a tiny one is trained")
    parser.add_argument("--data", type=Path, help="its tiles, if they moved")
    parser.add_argument("--anchors", type=int, default=4, help="tiles shown, one in a row; default: %(default)s")
    parser.add_argument("--shown", type=int, default=5, help="members shown of each kind; default: %(default)s")
    parser.add_argument("--side", type=int, default=56, help="of a tile in the picture, px; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of what is shown; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("sgcl_positives.jpg"), help="default: %(default)s")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        module, tiles = read_run(arguments.run or train_on_synthetic_slides(Path(scratch)), arguments.data)
        sets = mine(module, len(tiles))
        labels = np.asarray(tiles.labels or ("",) * len(tiles))
        if tiles.labels is not None:
            print_shares(sets, labels)
        anchors = choose_anchors(sets, labels, arguments.anchors, rng)
        draw(sets, anchors, tiles, labels, arguments, rng).save(arguments.out, quality=88)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
