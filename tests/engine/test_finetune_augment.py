"""What the settings of augmentation do to a fine-tuning."""

import json

import pytest

from ssmamba_models.engine.finetune import finetune
from ssmamba_models.engine.finetune_config import FinetuneConfig

for package in ("accelerate", "tensorboard", "torchmetrics", "yaml"):
    pytest.importorskip(package, reason="training needs the [train] extra")
pytestmark = pytest.mark.usefixtures("one_thread")


def first_loss(data, out, **augmentation):
    config = FinetuneConfig(
        data=str(data), model="test_ssmamba", init="none", img_size=32, batch_size=6, epochs=1, workers=0,
        log_every=1, lr=1e-3, layer_decay=None, device="cpu", **augmentation,
    )  # fmt: skip
    finetune(config, out, progress=False)
    return json.loads((out / "log.jsonl").read_text().splitlines()[0])["loss"]


@pytest.mark.parametrize("policy", [None, "rand-m5-n1"])
def test_colour_jitter_acts_with_and_without_a_policy(policy, labelled_tiles, tmp_path):
    losses = [
        first_loss(labelled_tiles, tmp_path / str(strength), auto_augment=policy, color_jitter=strength)
        for strength in (0.0, 0.5, 1.0)
    ]
    assert len(set(losses)) == 3
