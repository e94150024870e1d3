"""What PAMA reads on a slide: the tiles that reach its vector, and what single anchors read.

python examples/pama_attention.py [--run RUN --features slide.h5] [--out pama_attention.png]

RUN is a folder of `ssmamba slide-pretrain --method pama`, slide.h5 a feature file of the kind it was trained on.
Without them a tiny PAMA is trained on synthetic slides, which takes half a minute. The first panel is the whole slide,
the others the anchors that are read most, each marked; tiles are coloured by rank, dark least, yellow most.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ssmamba_models.data.features import read_slide_features
from ssmamba_models.data.synthetic_slides import write_synthetic_slides
from ssmamba_models.engine.slide_pretrain import SlidePretrainConfig, pretrain_slides
from ssmamba_models.evaluation.heatmap import attention_ranks, color_tiles
from ssmamba_models.slide.slide_weights import load_slide_encoder

GAP = 8


def train_on_synthetic_slides(folder):
    """A tiny PAMA and a slide that it was trained on."""
    features = write_synthetic_slides(folder / "features", patients=12, tiles=120).parent
    config = SlidePretrainConfig(
        features=str(features), method="pama", model="test_pama", epochs=8, batch_size=6, lr=2e-3, workers=0
    )
    pretrain_slides(config, folder / "run", progress=False)
    return folder / "run", features / "slide_001_0.h5"


def read_attention(run, file):
    """Of a slide: what reached its vector (N,), then for each anchor the tile that it is, and what it read (N,)."""
    encoder = load_slide_encoder(run).eval()
    with torch.inference_mode():
        tokens = encoder.tokens(
            torch.from_numpy(file.features).float()[None], torch.from_numpy(file.tile_grid).float()[None]
        )
    weights = tokens.class_weights[0].mean(0)
    most = [int(anchor) for anchor in weights.argsort(descending=True) if tokens.anchor_mask[0, anchor]]
    anchors = [(int(tokens.geometry.anchors[0, k]), tokens.anchor_weights[0, :, k].mean(0).numpy()) for k in most]
    return tokens.attention[0].numpy(), anchors


def panel(file, attention, side, marked=None):
    """The slide's tiles, coloured by the rank of their attention."""
    corner = file.coords.min(0)
    extent = file.coords.max(0) - corner + file.patch_size_level0
    downsample = float(extent.max() / side)
    width, height = (max(1, round(length / downsample)) for length in extent)
    white = np.full((height, width, 3), 255, np.uint8)
    coords = file.coords - corner
    picture = color_tiles(white, downsample, coords, file.patch_size_level0, attention_ranks(attention), opacity=1.0)
    if marked is not None:
        left, top = (float(value) / downsample for value in coords[marked])
        end = file.patch_size_level0 / downsample
        ImageDraw.Draw(picture).rectangle((left, top, left + end, top + end), outline=(255, 0, 0), width=2)
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a PAMA run; without it a tiny one is trained")
    parser.add_argument("--features", type=Path, help="feature file of a slide; needed with --run")
    parser.add_argument("--anchors", type=int, default=3, help="how many are shown; default: %(default)s")
    parser.add_argument("--side", type=int, default=240, help="of a panel in pixels; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("pama_attention.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    if (arguments.run is None) != (arguments.features is None):
        parser.error("give --run and --features, or neither")
    with tempfile.TemporaryDirectory() as scratch:
        run, path = (arguments.run, arguments.features) if arguments.run else train_on_synthetic_slides(Path(scratch))
        file = read_slide_features(path)
        attention, anchors = read_attention(run, file)
    panels = [panel(file, attention, arguments.side)]
    panels += [panel(file, read, arguments.side, tile) for tile, read in anchors[: arguments.anchors]]
    width = sum(one.width for one in panels) + GAP * (len(panels) - 1)
    picture = Image.new("RGB", (width, max(one.height for one in panels)), "white")
    left = 0
    for one in panels:
        picture.paste(one, (left, 0))
        left += one.width + GAP
    picture.save(arguments.out)
    print(f"{path.name}: {len(attention)} tiles, {len(anchors)} anchors; the tile read most has {attention.max():.1%}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
