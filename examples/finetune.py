"""Fine-tune a classifier on labelled tiles, then use it: `ssmamba finetune` in Python.

python examples/finetune.py [--folder tiles] [--model ssmamba_tiny] [--init none] [--epochs 8] [--out run]

Without --folder synthetic H&E tiles of three kinds are drawn. A folder of your own has one folder per class, or a
manifest.csv (path, label, group, split). --init takes a run of `ssmamba pretrain`, a weight file, or "pretrained".
"""

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from timm.data import create_transform, resolve_model_data_config

import ssmamba_models  # noqa: F401  (importing it registers the models with timm)
from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.data.tiles import read_tile
from ssmamba_models.engine.finetune import finetune
from ssmamba_models.engine.finetune_config import FinetuneConfig


def train(folder, arguments, out):
    """Train, and print how good the best epoch is on tiles that were held out."""
    config = FinetuneConfig(
        data=str(folder),
        model=arguments.model,
        init=arguments.init,
        img_size=arguments.size,
        epochs=arguments.epochs,
        batch_size=16,
        lr=2e-4,
    )
    result = finetune(config, out)
    best = result.best
    print(f"best epoch {best['epoch']}: accuracy {best['accuracy']:.0%}, macro-F1 {best['macro_f1']:.0%}")
    for name, row in best["per_class"].items():
        print(f"  {name:20s} F1 {row['f1']:.0%} on {row['support']} tiles")
    return result.classes


def predict(weights, model_name, size, classes, path):
    """Use the trained weights as those of any timm model."""
    model = timm.create_model(model_name, num_classes=len(classes), checkpoint_path=str(weights)).eval()
    transform = create_transform(**resolve_model_data_config(model, {"img_size": size}), is_training=False)
    with torch.inference_mode():
        probabilities = model(transform(read_tile(path))[None]).softmax(1)[0]
    return classes[probabilities.argmax()], probabilities.max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="labelled tiles")
    parser.add_argument("--model", default="ssmamba_tiny", help="ours, or any timm name; default: %(default)s")
    parser.add_argument("--init", default="none", help="first weights of the encoder; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=64, help="side of the input in pixels; default: %(default)s")
    parser.add_argument("--out", help="run folder to write; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or write_synthetic_tiles(Path(scratch) / "tiles", tiles_per_kind=32, size=128)
        out = Path(arguments.out or Path(scratch) / "run")
        classes = train(folder, arguments, out)
        tiles = read_tiles(folder)
        name, probability = predict(
            out / "weights.safetensors", arguments.model, arguments.size, classes, tiles.root / tiles.paths[0]
        )
        print(f"{tiles.paths[0]} is {tiles.labels[0]}; predicted {name} with probability {probability:.2f}")


if __name__ == "__main__":
    main()
