"""Weights as the Hugging Face Hub holds them: written to a folder, loaded from it, and the same features found again.

python examples/hub_roundtrip.py [RUN|FILE --model NAME] [--out bundle]

Uploads nothing. `ssmamba publish RUN --repo-id ORG/NAME` sends the same files; then "hf-hub:ORG/NAME" stands for the
folder below.
"""

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

import ssmamba_models
from ssmamba_models.data.synthetic import synthetic_he
from ssmamba_models.engine.weights import load_weights
from ssmamba_models.hub import CardInfo, publish


def make_weights(name, folder):
    """Random weights in place of trained ones."""
    path = Path(folder) / "weights.safetensors"
    save_file(timm.create_model(name, num_classes=0).state_dict(), path, {"model": name})
    return path


def embed(model, image):
    """The features of one image, through the transform that belongs to the model."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        return model.eval()(transform(image)[None])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="run folder or weight file; without it random weights are made")
    parser.add_argument("--model", default="ssmamba_tiny", help="what the weights are of; default: %(default)s")
    parser.add_argument("--out", help="new folder to keep; without it a temporary one is used")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = arguments.source or make_weights(arguments.model, temporary)
        folder = arguments.out or Path(temporary) / "bundle"
        # What is not said here, the card says to be unknown.
        info = CardInfo() if arguments.source else CardInfo(training_data="none: random weights")
        done = publish(source, "my-lab/example", arguments.model, info=info, dry_run=folder)
        for name in done.files:
            print(f"{(Path(done.place) / name).stat().st_size:>11,} bytes  {name}")
        loaded = ssmamba_models.create_model(done.name, pretrained=True, num_classes=0)
        original = timm.create_model(arguments.model, num_classes=0)
        load_weights(original, source)
        # The same transform for both: the published one knows the size that the run was trained at.
        original.pretrained_cfg = loaded.pretrained_cfg
        image = synthetic_he(256)
        features, expected = embed(loaded, image), embed(original, image)
        print(f"features {tuple(features.shape)}, largest difference {(features - expected).abs().max().item():g}")


if __name__ == "__main__":
    main()
