"""The encoders through timm: features, feature maps, intermediate maps, and any input size.

python examples/timm_usage.py [--image tile.png] [--model ssmamba_tiny]
"""

import argparse

import timm
import torch
from timm.data import create_transform, resolve_model_data_config

import ssmamba_models  # noqa: F401  (importing it registers the models with timm)
from ssmamba_models.data.synthetic import synthetic_he
from ssmamba_models.data.tiles import read_tile


def show_features(name, image):
    """One vector for one image: the usual way to use an encoder."""
    model = timm.create_model(name, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        features = model(transform(image)[None])
    print(f"features            {tuple(features.shape)}")


def show_feature_maps(name):
    """Four maps at stride 4, 8, 16 and 32: what a segmentation or detection head takes."""
    model = timm.create_model(name, features_only=True).eval()
    with torch.inference_mode():
        maps = model(torch.randn(1, 3, 224, 224))
    for info, grid in zip(model.feature_info.get_dicts(), maps, strict=True):
        print(f"map, stride {info['reduction']:>2}      {tuple(grid.shape)}")


def show_intermediates(name):
    """The last map and chosen earlier ones in one pass, from the model that also classifies."""
    model = timm.create_model(name, num_classes=3).eval()
    with torch.inference_mode():
        last, maps = model.forward_intermediates(torch.randn(1, 3, 224, 224), indices=[2, 3], output_fmt="NCHW")
        logits = model.forward_head(last)
    print(f"intermediates       {[tuple(grid.shape) for grid in maps]}, logits {tuple(logits.shape)}")


def show_sizes(name):
    """Any height and width: there is no position table, and the cost is linear in the pixels."""
    model = timm.create_model(name, num_classes=0).eval()
    for height, width in ((96, 96), (225, 250), (512, 384)):
        with torch.inference_mode():
            features = model(torch.randn(1, 3, height, width))
        print(f"{height:>4} x {width:<4} px      {tuple(features.shape)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="a tile; without it a synthetic H&E image is drawn")
    parser.add_argument("--model", default="ssmamba_tiny", help="default: %(default)s")
    arguments = parser.parse_args()
    image = read_tile(arguments.image) if arguments.image else synthetic_he(224)
    show_features(arguments.model, image)
    show_feature_maps(arguments.model)
    show_intermediates(arguments.model)
    show_sizes(arguments.model)


if __name__ == "__main__":
    main()
