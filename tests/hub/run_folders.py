"""Run folders as training leaves them, without the training."""

import json

import timm
import torch
from safetensors.torch import save_file


def write_run(folder, num_classes=0, model="test_ssmamba", seed=7, **metadata):
    """A run folder as `ssmamba pretrain` and `ssmamba finetune` leave it."""
    torch.manual_seed(seed)
    network = timm.create_model(model, num_classes=num_classes)
    folder.mkdir(parents=True)
    said = {"model": model, "method": "mamim", "img_size": "64", "epochs": "2", "step": "4", "data": "ab" * 32}
    save_file(network.state_dict(), folder / "weights.safetensors", {**said, **metadata})
    (folder / "config.yaml").write_text("data: /home/someone/private/tiles\ndevice: cuda:3\nepochs: 2\nlr: 0.001\n")
    lines = [
        {"step": 2, "epoch": 1, "images": 8, "event": "epoch", "loss": 2.5, "seconds": 1000.5},
        {"step": 4, "epoch": 2, "images": 16, "event": "epoch", "loss": 1.25, "seconds": 1801.5},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    return folder
