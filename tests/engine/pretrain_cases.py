"""Quick pretrainings, what they wrote, and a method whose loss draws from the global generator."""

import json

import torch
from torch import nn

from ssmamba_models.engine.pretrain import PretrainConfig, pretrain
from ssmamba_models.engine.weights import read_weights

QUICK = {
    "model": "test_ssmamba",
    "img_size": 64,
    "batch_size": 4,
    "epochs": 3,
    "workers": 0,
    "log_every": 1,
    "lr": 1e-3,
}
PARTS = ("loss", "low", "high", "color", "cross")


def config_of(data, **changes):
    return PretrainConfig(data=str(data), **{**QUICK, **changes})


def run_of(data, out, *, resume=False, **changes):
    return pretrain(config_of(data, **changes), out, resume=resume, progress=False)


def log_of(run, event=None):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == event]


def curve_of(run, names=("step", *PARTS, "lr", "grad_norm")):
    return [[line[name] for name in names] for line in log_of(run)]


def weights_of(run):
    return read_weights(run / "weights.safetensors")[0]


def assert_same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Noisy(nn.Module):
    """A method whose loss draws from the global generator, so that a lost state of it shows in the curve."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, batch):
        noise = torch.rand(len(batch["image"]))
        return {"loss": (noise * self.encoder(batch["image"]).square().mean(1)).mean()}


class PlainViews:
    """A fixed crop with a little seeded noise."""

    def __init__(self, img_size: int, noise: float = 0.1):
        self.img_size, self.noise = img_size, noise

    def __call__(self, image, generator):
        pixels = torch.frombuffer(bytearray(image.resize((self.img_size,) * 2).tobytes()), dtype=torch.uint8)
        pixels = pixels.view(self.img_size, self.img_size, 3).permute(2, 0, 1) / 255
        return {"image": pixels + self.noise * torch.randn(pixels.shape, generator=generator)}
