"""A whole slide to a file of features, and to a picture of which of its tiles look alike to the model.

python examples/extract_slide.py                                         # on a slide that it draws itself
python examples/extract_slide.py --slide slide.svs --model ssmamba_small --pretrained
python examples/extract_slide.py --slide slide.tif --mpp-override 0.25   # where the file tells no size of its pixels

The job folder holds what `ssmamba extract` makes: thumbnails with tissue and tiles, outlines for QuPath, summary.csv
and the feature file. Beside it, extract_slide.png shows the slide and its tiles in colours: the first three principal
components of their features. Call it again, and it finds the slide done.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ssmamba_models.data.features import read_slide_features
from ssmamba_models.data.synthetic import synthetic_he
from ssmamba_models.wsi.extract import extract_slides
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.reader import open_slide


def draw_slide(path, side=672, margin=112):
    """Three kinds of tissue side by side on glass, at 0.5 um per pixel."""
    slide = Image.new("RGB", (3 * side + 2 * margin, side + 2 * margin), (244, 243, 244))
    for index, kind in enumerate(("glands", "stroma", "solid")):
        slide.paste(synthetic_he(side, seed=index, kind=kind), (margin + index * side, margin))
    slide.save(path, resolution_unit="cm", resolution=10_000 / 0.5)
    return path


def principal_colours(features):
    """The first three principal components, stretched to red, green and blue."""
    centred = features.astype(np.float64) - features.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    parts = centred @ axes[:3].T
    low, high = np.percentile(parts, (2, 98), axis=0)
    colours = np.full((len(features), 3), 0.5)
    colours[:, : parts.shape[1]] = ((parts - low) / np.maximum(high - low, 1e-9)).clip(0, 1)
    return (colours * 255).astype(np.uint8)


def draw(slide_path, mpp_override, read, width=900):
    """The slide, and below it the same with its tiles in colours."""
    with open_slide(slide_path, mpp_override) as slide:
        image, downsample = slide.thumbnail(width)
    plain = Image.fromarray(image)
    coloured = plain.copy()
    pen = ImageDraw.Draw(coloured)
    side = read.patch_size_level0 / downsample
    for (x, y), colour in zip(read.coords / downsample, principal_colours(read.features)):
        pen.rectangle((x, y, x + side, y + side), fill=tuple(colour.tolist()))
    sheet = Image.new("RGB", (plain.width, 2 * plain.height + 8), "white")
    sheet.paste(plain, (0, 0))
    sheet.paste(Image.blend(plain, coloured, 0.6), (0, plain.height + 8))
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="any slide; default: one that is drawn")
    parser.add_argument("--model", default="ssmamba_tiny", help="ours, or any timm name; default: %(default)s")
    parser.add_argument("--pretrained", action="store_true", help="use the model's published weights")
    parser.add_argument("--checkpoint", help="use these weights; without either they are random")
    parser.add_argument("--mpp", type=float, default=0.5, help="um per pixel of the tiles; default: %(default)s")
    parser.add_argument("--mpp-override", type=float, help="um per level-0 pixel, where the slide does not tell")
    parser.add_argument("--tile-size", type=int, default=224, help="px; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("extract_job"), help="job folder; default: %(default)s")
    arguments = parser.parse_args()
    plan = ExtractPlan(
        model=arguments.model,
        pretrained=arguments.pretrained,
        checkpoint=arguments.checkpoint,
        mpp=arguments.mpp,
        mpp_override=arguments.mpp_override,
        tile_size=arguments.tile_size,
        img_size=arguments.tile_size,
    )
    with tempfile.TemporaryDirectory() as scratch:
        slide = arguments.slide or draw_slide(Path(scratch) / "drawn.tif")
        result = extract_slides(slide, arguments.out, plan)
        if not result.done:
            parser.exit(1, f"no features: {result.failed or 'no tissue found'}\n")
        read = read_slide_features(result.features / f"{result.done[0]}.h5")
        picture = arguments.out.with_name("extract_slide.png")
        draw(slide, arguments.mpp_override, read).save(picture)
    print(f"{len(read.coords)} tiles x {read.features.shape[1]} features of {read.name}, each {read.patch_size} px")
    print(f"level 0 at {read.level0_mpp:g} um/px ({read.attributes['mpp_source']}), tiles at {read.target_mpp:g}")
    print(f"wrote {result.features} and {picture}")


if __name__ == "__main__":
    main()
