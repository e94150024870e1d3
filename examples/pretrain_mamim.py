"""Pretrain an encoder by MAMIM on tiles without labels: the run that the packaged weights come from, or a quick look.

python examples/pretrain_mamim.py --data lc25000 --out run    # ssmamba_tiny's packaged weights: an hour or two
python examples/pretrain_mamim.py --data lc25000 --out run --model ssmamba_small    # those of ssmamba_small
python examples/pretrain_mamim.py --quick --out run           # synthetic tiles and a tiny model: under a minute
python examples/pretrain_mamim.py --data tiles --config my.yaml --out run

The run folder holds the curves (log.jsonl, tensorboard/), pictures of what the model fills in (reconstructions/) and
the encoder (weights.safetensors). A run that was stopped goes on when the same line is called again with --resume.
"""

import argparse
import json
import tempfile
from pathlib import Path

import timm
import torch

import ssmamba_models
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.engine.config import load_config
from ssmamba_models.engine.pretrain import PretrainConfig, pretrain
from ssmamba_models.engine.weights import load_weights

WEIGHTS = Path(ssmamba_models.__file__).parent / "weights"
QUICK = {
    "model": "test_ssmamba",
    "img_size": 96,
    "epochs": 6,
    "batch_size": 12,
    "lr": 2e-3,
    "workers": 0,
    "log_every": 1,
    "reconstruct_every": 3,
}


def epoch_losses(run):
    """The mean loss of each epoch, from the log."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line.get("event") == "epoch"]


def load_encoder(run, config):
    """What a run leaves is the plain timm model."""
    encoder = timm.create_model(config.model, num_classes=0, **config.model_args).eval()
    load_weights(encoder, run)
    return encoder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of tiles, flat or nested")
    parser.add_argument("--model", default="ssmamba_tiny", help="whose packaged weights; default: %(default)s")
    parser.add_argument("--config", help="settings; default: those of the packaged weights")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--quick", action="store_true", help="a tiny model, on synthetic tiles if there is no --data")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    arguments = parser.parse_args()
    if not arguments.quick and not arguments.data:
        parser.error("give --data FOLDER, or --quick to look at synthetic tiles")
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or write_synthetic_tiles(scratch, tiles_per_kind=16, size=128)
        packaged = WEIGHTS / f"{arguments.model}.mamim_lc25000.yaml"
        source = arguments.config or (None if arguments.quick else packaged)
        config = load_config(PretrainConfig, source, {"data": data, **(QUICK if arguments.quick else {})})
        result = pretrain(config, arguments.out, resume=arguments.resume)
    losses = epoch_losses(result.run)
    print(
        f"{result.step} of {result.steps} steps; loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last"
    )
    features = load_encoder(result.run, config)(torch.zeros(1, 3, config.img_size, config.img_size))
    print(f"{result.run / 'weights.safetensors'}: {config.model}, {features.shape[1]} features")
    print(f"look at {result.run / 'reconstructions'}: tile, what the model sees of it, what it fills in")


if __name__ == "__main__":
    main()
