"""Weights by name: which names have them, where they come from, and what timm can do with them."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

import ssmamba_models
from ssmamba_models import weights
from ssmamba_models.engine.encoder import load_encoder
from ssmamba_models.weights import weight_source

PUBLISHED = ["ssmamba_small.mamim_lc25000", "ssmamba_tiny.mamim_lc25000"]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_names_that_have_weights(ssmamba):
    assert ssmamba_models.list_models(pretrained=True) == PUBLISHED
    assert timm.list_pretrained("ssmamba*") == PUBLISHED
    assert ssmamba("list", "ssmamba_tiny").stdout.splitlines()[-1].endswith("mamim_lc25000")
    assert ssmamba("list", "test_ssmamba").stdout.splitlines()[-1].endswith("none")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_without_a_tag_means_its_first_weights(name):
    cfg = timm.models.get_pretrained_cfg(name)
    assert timm.models.get_pretrained_cfg(name.split(".")[0]) == cfg
    assert (cfg.tag, cfg.hf_hub_id) == ("mamim_lc25000", f"ssmamba-models/{name}")


def test_a_packaged_file_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    assert weight_source("some.tag") == {"hf_hub_id": "ssmamba-models/some.tag"}
    (tmp_path / "some.tag.safetensors").touch()
    source = {"hf_hub_id": "ssmamba-models/some.tag", "file": str(tmp_path / "some.tag.safetensors")}
    assert weight_source("some.tag") == source


class TestFromAFile:
    """As the packaged files: bfloat16, without a classifier."""

    @pytest.fixture
    def trained(self):
        torch.manual_seed(7)
        return timm.create_model("test_ssmamba", num_classes=0)

    @pytest.fixture
    def create(self, trained, tmp_path):
        path = tmp_path / "test_ssmamba.some_tag.safetensors"
        save_file({name: value.bfloat16() for name, value in trained.state_dict().items()}, path)
        overlay = {"file": str(path)}
        return lambda **options: timm.create_model(
            "test_ssmamba", pretrained=True, pretrained_cfg_overlay=overlay, **options
        )

    def test_the_parameters_are_float32(self, create, trained):
        state = create().state_dict()
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert all(torch.equal(state[name], value.bfloat16().float()) for name, value in trained.state_dict().items())

    def test_a_new_classifier(self, create, caplog):
        with caplog.at_level("WARNING"):
            model = create(num_classes=5, drop_path_rate=0.1, drop_rate=0.1)
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
        assert not caplog.records
        assert torch.equal(model.head.norm.weight, create().head.norm.weight)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_one_channel_is_the_float32_sum_of_three(self, dtype, trained, tmp_path):
        """Whatever precision the file has: the sum is not rounded to it."""
        path = tmp_path / "weights.safetensors"
        save_file({name: value.to(dtype) for name, value in trained.state_dict().items()}, path)
        grey = timm.create_model(
            "test_ssmamba", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, in_chans=1
        ).stem.conv1.weight
        want = trained.stem.conv1.weight.to(dtype).float().sum(1, keepdim=True)
        assert torch.equal(grey, want)
        assert dtype == torch.float32 or not torch.equal(want, want.to(dtype).float())

    def test_four_channels(self, create):
        colour = create().stem.conv1.weight
        four = create(in_chans=4)
        assert torch.equal(four.stem.conv1.weight, torch.cat((colour, colour[:, :1]), 1) * 0.75)
        assert four(torch.zeros(1, 4, 64, 64)).shape == (1, 48)

    def test_feature_maps(self, create):
        image = torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            maps = create(features_only=True).eval()(image)
            _, expected = create().eval().forward_intermediates(image, output_fmt="NHWC")
        assert len(maps) == 4
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, expected))

    @pytest.mark.parametrize(
        "options",
        [{"global_pool": "max"}, {"global_pool": ""}, {"global_pool": "catavgmax"}, {"proj_drop_rate": 0.1}],
    )
    def test_other_options(self, create, options):
        assert torch.equal(create(**options).stem.conv2.weight, create().stem.conv2.weight)


@pytest.mark.parametrize("name", ["ssmamba_base", "test_ssmamba"])
class TestModelsWithoutWeights:
    def check(self, create):
        with pytest.raises(ValueError, match="has no") as error:
            create()
        assert all(name in str(error.value) for name in PUBLISHED)

    def test_in_python(self, name):
        self.check(lambda: timm.create_model(name, pretrained=True))
        self.check(lambda: ssmamba_models.create_model(name, pretrained=True))
        self.check(lambda: timm.create_model(name, pretrained=True, features_only=True))
        self.check(lambda: load_encoder(name, pretrained=True))

    def test_on_the_command_line(self, name, ssmamba, labelled_tiles, tmp_path):
        pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
        result = ssmamba("embed", labelled_tiles, "--out", tmp_path / "f.h5", "--model", name, "--pretrained")
        assert result.exit_code == 2
        assert f"{name} has no published weights" in result.stderr
        assert PUBLISHED[0] in result.stderr


def test_an_unknown_tag_names_those_that_exist():
    for create in (ssmamba_models.create_model, load_encoder):
        with pytest.raises(ValueError, match=r"no_such_tag.*mamim_lc25000"):
            create("ssmamba_tiny.no_such_tag", pretrained=True)


NO_NETWORK = """
import socket, sys
def refuse(*arguments, **options):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import timm, torch
import ssmamba_models
for name in sys.argv[1:]:
    model = timm.create_model(name, pretrained=True, num_classes=0).eval()
    torch.manual_seed(0)
    other = timm.create_model(name.split(".")[0], num_classes=0)
    assert not torch.equal(model.stem.conv1.weight, other.stem.conv1.weight)
    assert next(model.parameters()).dtype == torch.float32
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 96, 96)).isfinite().all()
"""


def test_packaged_weights_need_no_network():
    packaged = [name for name in PUBLISHED if (weights.FOLDER / f"{name}.safetensors").is_file()]
    if not packaged:
        pytest.skip(f"no weights in {weights.FOLDER} yet")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, *packaged, *(name.split(".")[0] for name in packaged)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PUBLISHED)
def test_packaged_weights_come_with_card_and_configuration(name):
    if not (weights.FOLDER / f"{name}.safetensors").is_file():
        pytest.skip(f"no weights of {name} yet")
    card = (weights.FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert (weights.FOLDER / f"{name}.yaml").stat().st_size > 0
