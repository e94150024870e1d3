"""Slide encoders are published as tile encoders are, and loaded from a folder and from the Hub."""

import json
import os

import pytest
import torch
import yaml
from fake_hub import WRITER
from hub_client import RemoteError
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from ssmamba_models.hub import CardInfo, publish
from ssmamba_models.models.published import WeightsError, file_sha256
from ssmamba_models.slide import create_slide_encoder
from ssmamba_models.slide.slide_weights import save_slide_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

PROVENANCE = {
    "feature_dim": 6,
    "model": "ssmamba_small",
    "weights_sha256": "cd" * 32,
    "target_mpp": 0.5,
    "patch_size": 224,
}


@pytest.fixture(scope="module")
def slide_run(tmp_path_factory):
    """A run folder as `ssmamba slide-pretrain` leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(3)
    metadata = {"method": "gigassl", "epochs": "2", "step": "4", "slides": 9, "data": "ab" * 32}
    save_slide_encoder(create_slide_encoder("test_gigassl", 6), folder, {**metadata, "provenance": PROVENANCE})
    (folder / "config.yaml").write_text("features: /home/someone/private/slides\ncache_gb: 9.0\nepochs: 2\nlr: 0.001\n")
    line = {"step": 4, "epoch": 2, "slides": 18, "event": "epoch", "loss": 1.25, "seconds": 1801.5}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def tiles():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 6, generator=generator), torch.randint(9, (20, 2), generator=generator).float()


class TestFolder:
    def test_three_files_that_create_slide_encoder_loads(self, slide_run, tmp_path):
        done = publish(slide_run, "lab/slides", dry_run=tmp_path / "out")
        assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors"]
        assert done.name == str(tmp_path / "out")
        loaded = eval(done.call, {"create_slide_encoder": create_slide_encoder})
        own = create_slide_encoder("test_gigassl", 6, pretrained=slide_run)
        assert torch.equal(loaded.embed(*tiles()), own.embed(*tiles()))

    def test_the_configuration_keeps_the_runs_facts_and_the_publishers(self, slide_run, tmp_path):
        info = CardInfo(training_data="my slides", license="mit")
        publish(slide_run, "lab/slides", info=info, dry_run=tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["metadata"]["provenance"] == PROVENANCE
        domain = {key: config["domain"][key] for key in ("target_mpp", "tile_size", "training_data", "license")}
        assert domain == {"target_mpp": 0.5, "tile_size": 224, "training_data": "my slides", "license": "mit"}
        assert config["domain"]["sha256"] == file_sha256(tmp_path / "out" / "model.safetensors")

    def test_the_card_says_what_is_known_and_nothing_private(self, slide_run, tmp_path):
        publish(slide_run, "lab/slides", info=CardInfo(license="mit"), dry_run=tmp_path / "out")
        text = (tmp_path / "out" / "README.md").read_text()
        card = ModelCard(text)
        assert (card.data.license, "whole-slide-image" in card.data.tags) == ("mit", True)
        for said in (
            'create_slide_encoder("test_gigassl", feature_dim=6, pretrained="hf-hub:lab/slides")',
            "ssmamba slide-embed --run hf-hub:lab/slides",
            "| tile encoder | `ssmamba_small` |",
            "| magnification | 0.5 microns per pixel |",
            "| slides looked at, repetitions counted | 18 |",
            "| time | 30 min |",
            "| training data | unknown |",
            "| loss | 1.25 |",
        ):
            assert said in text
        assert "someone" not in text
        settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
        assert settings == {"features": "slides", "epochs": 2, "lr": 0.001}

    def test_bf16(self, slide_run, tmp_path):
        publish(slide_run, "lab/slides", dtype="bfloat16", dry_run=tmp_path / "half")
        stored = load_file(tmp_path / "half" / "model.safetensors")
        assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.bfloat16}
        loaded = create_slide_encoder("test_gigassl", 6, pretrained=tmp_path / "half")
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}

    def test_bad_input(self, slide_run, tmp_path):
        with pytest.raises(ValueError, match="leave --model out"):
            publish(slide_run, "lab/slides", "ssmamba_tiny", dry_run=tmp_path / "out")
        with pytest.raises(ValueError, match="feature_dim is 7"):
            create_slide_encoder("test_gigassl", 7, pretrained=slide_run)
        publish(slide_run, "lab/slides", dry_run=tmp_path / "spoiled")
        weights = tmp_path / "spoiled" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        with pytest.raises(WeightsError, match="not those that were published"):
            create_slide_encoder("test_gigassl", 6, pretrained=tmp_path / "spoiled")
        with pytest.raises(WeightsError, match="not those that were published"):
            publish(tmp_path / "spoiled", "lab/slides", dry_run=tmp_path / "again")
        assert not (tmp_path / "again").exists()


def test_up_to_the_hub_and_down_again(hub, client, slide_run):
    done = client(
        f"from ssmamba_models.hub import publish\ndone = publish({str(slide_run)!r}, 'lab/slides')\n"
        "value = [done.name, done.call, list(done.files)]",
        token=WRITER,
    )
    assert done == [
        "hf-hub:lab/slides",
        'create_slide_encoder("test_gigassl", 6, pretrained="hf-hub:lab/slides")',
        ["config.json", "model.safetensors", "README.md"],
    ]
    code = f"""
from ssmamba_models.slide import create_slide_encoder
features, grid = torch.tensor({tiles()[0].tolist()}), torch.tensor({tiles()[1].tolist()})
value = create_slide_encoder("test_gigassl", 6, pretrained="hf-hub:lab/slides").embed(features, grid).tolist()
"""
    own = create_slide_encoder("test_gigassl", 6, pretrained=slide_run).embed(*tiles())
    assert client(code) == pytest.approx(own.tolist(), abs=1e-6)
    with pytest.raises(RemoteError, match="there is no repository 'lab/none'"):
        client(code.replace("lab/slides", "lab/none"))
