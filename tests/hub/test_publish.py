"""What `ssmamba publish --dry-run` writes, and that timm and this package load it; no network."""

import json
import os

import pytest
import timm
import torch
from run_folders import write_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ssmamba_models
from ssmamba_models.engine.encoder import load_encoder
from ssmamba_models.engine.weights import weights_sha256
from ssmamba_models.hub import CardInfo, bundle, publish
from ssmamba_models.models.published import WeightsError, file_sha256

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(run, tmp_path):
    publish(run, "lab/model", info=CardInfo(target_mpp=0.5, training_data="synthetic"), dry_run=tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def classifier(tmp_path):
    return write_run(tmp_path / "classifier", num_classes=3, classes='["a", "b", "c"]', method="finetune")


def state_of(run):
    return load_file(run / "weights.safetensors")


class TestWhatIsWritten:
    def test_three_files_and_no_pickle(self, folder):
        assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
        assert os.listdir(folder.parent) == ["out"]

    def test_the_weights_are_those_of_the_run_with_their_metadata(self, run, folder):
        published, own = load_file(folder / "model.safetensors"), state_of(run)
        assert published.keys() == own.keys()
        assert all(torch.equal(published[name], own[name]) for name in own)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert {"model": "test_ssmamba", "img_size": "64", "method": "mamim"}.items() <= file.metadata().items()

    def test_the_configuration_is_timms_with_the_domain_beside(self, folder):
        config = json.loads((folder / "config.json").read_text())
        assert (config["architecture"], config["num_classes"], config["num_features"]) == ("test_ssmamba", 0, 48)
        domain = {key: config["domain"][key] for key in ("target_mpp", "tile_size", "embed_dim", "training_data")}
        assert domain == {"target_mpp": 0.5, "tile_size": 64, "embed_dim": 48, "training_data": "synthetic"}
        assert config["domain"]["sha256"] == file_sha256(folder / "model.safetensors")
        assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
        # A stranger in there stops timm, and a source would send it elsewhere.
        known = timm.models.PretrainedCfg.__dataclass_fields__
        assert config["pretrained_cfg"].keys() <= known.keys()
        assert not {"url", "file", "hf_hub_id", "tag"} & config["pretrained_cfg"].keys()

    def test_bf16_is_half_the_size(self, run, folder, tmp_path):
        publish(run, "lab/model", dtype="bfloat16", dry_run=tmp_path / "half")
        half = load_file(tmp_path / "half" / "model.safetensors")
        assert {value.dtype for value in half.values()} == {torch.bfloat16}
        assert all(torch.equal(half[name], value.bfloat16()) for name, value in state_of(run).items())
        network = timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True)
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}

    def test_an_empty_folder_is_taken(self, run, tmp_path):
        (tmp_path / "empty").mkdir()
        done = publish(run, "lab/model", dry_run=tmp_path / "empty")
        assert done.name == f"local-dir:{tmp_path / 'empty'}"

    def test_a_file_of_weights_and_any_timm_model(self, tmp_path):
        torch.manual_seed(3)
        vit = timm.create_model("test_vit", num_classes=4)
        torch.save({"state_dict": vit.state_dict()}, tmp_path / "m.pth")
        done = publish(tmp_path / "m.pth", "lab/vit", "test_vit", dry_run=tmp_path / "out")
        assert sorted(os.listdir(done.place)) == ["README.md", "config.json", "model.safetensors"]
        assert weights_sha256(timm.create_model(done.name, pretrained=True)) == weights_sha256(vit)

    def test_a_model_made_with_arguments(self, tmp_path):
        scales = [[1], [1], [1], [1]]
        network = timm.create_model("test_ssmamba", scales=scales)
        said = {"model": "test_ssmamba", "model_args": json.dumps({"scales": scales})}
        save_file(network.state_dict(), tmp_path / "m.safetensors", said)
        done = publish(tmp_path / "m.safetensors", "lab/single", dry_run=tmp_path / "out")
        assert weights_sha256(timm.create_model(done.name, pretrained=True)) == weights_sha256(network)


class TestWhatLoadsIt:
    def test_every_way(self, run, folder):
        name = f"local-dir:{folder}"
        own = timm.create_model("test_ssmamba")
        own.load_state_dict(state_of(run))
        for model in (
            timm.create_model(name, pretrained=True),
            ssmamba_models.create_model(name, pretrained=True),
            load_encoder(name, pretrained=True).model,
            load_encoder("test_ssmamba", checkpoint=folder / "model.safetensors").model,
        ):
            assert weights_sha256(model) == weights_sha256(own)
        assert list(load_encoder(name, pretrained=True).data_config["input_size"]) == [3, 64, 64]

    @pytest.mark.parametrize(
        "options",
        [{"features_only": True}, {"in_chans": 1}, {"in_chans": 4}, {"num_classes": 5}, {"drop_path_rate": 0.2}],
        ids=str,
    )
    def test_timms_options(self, folder, options):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
        output = model(torch.zeros(1, options.get("in_chans", 3), 64, 64))
        assert len(output) == (4 if "features_only" in options else 1)

    def test_a_classifier_with_its_classes(self, classifier, tmp_path):
        done = publish(classifier, "lab/classes", dry_run=tmp_path / "out")
        model = timm.create_model(done.name, pretrained=True)
        assert model.num_classes == 3
        assert list(model.pretrained_cfg["label_names"]) == ["a", "b", "c"]
        assert torch.equal(model.head.fc.weight, state_of(classifier)["head.fc.weight"])
        assert load_encoder(done.name, pretrained=True).embed_dim == 48


class TestWeightsThatAreNotThosePublished:
    EVERY_WAY = pytest.mark.parametrize(
        "load",
        [
            lambda name: timm.create_model(name, pretrained=True),
            lambda name: ssmamba_models.create_model(name, pretrained=True),
            lambda name: load_encoder(name, pretrained=True),
        ],
        ids=["timm", "ours", "encoder"],
    )

    @EVERY_WAY
    def test_a_flipped_bit(self, folder, load):
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match=r"local-dir:.*not those that were published: the SHA-256 of"):
            load(f"local-dir:{folder}")

    @EVERY_WAY
    def test_no_weights(self, folder, load):
        (folder / "model.safetensors").unlink()
        with pytest.raises(WeightsError, match=r"holds no model\.safetensors, which its config\.json speaks of"):
            load(f"local-dir:{folder}")

    def test_weights_changed_after_they_were_loaded(self, folder):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
        self.test_a_flipped_bit(folder, lambda name: timm.create_model(name, pretrained=True))

    def test_no_configuration_and_no_folder(self, tmp_path):
        with pytest.raises(WeightsError, match=r"holds no config\.json"):
            ssmamba_models.create_model(f"local-dir:{tmp_path}")
        with pytest.raises(WeightsError, match=r"nowhere' is no folder with a config\.json"):
            ssmamba_models.create_model(f"local-dir:{tmp_path / 'nowhere'}")

    def test_random_weights_need_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        assert ssmamba_models.create_model(f"local-dir:{folder}").num_features == 48


class TestBadInput:
    def refused(self, tmp_path, kind, match, *arguments, **options):
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(kind, match=match):
            publish(*arguments, **{"dry_run": tmp_path / "out", **options})
        assert sorted(os.listdir(tmp_path)) == before

    @pytest.mark.parametrize("name", ["model", "a/b/c", "lab/", "lab/mo del", ""])
    def test_repository_names(self, run, tmp_path, name):
        self.refused(tmp_path, ValueError, "is not ORG/NAME|Repo id must|alphanumeric", run, name)

    def test_weights_that_say_no_model(self, run, tmp_path):
        path = tmp_path / "m.safetensors"
        save_file(state_of(run), path)
        self.refused(tmp_path, ValueError, "do not say of which model they are; give --model", path, "l/m")
        save_file(state_of(run), path, {"model": "local-dir:some.where"})
        self.refused(tmp_path, ValueError, "do not say of which model they are; give --model", path, "l/m")

    def test_another_model(self, run, tmp_path):
        self.refused(tmp_path, ValueError, "are of test_ssmamba .*do not fit ssmamba_tiny", run, "l/m", "ssmamba_tiny")
        self.refused(tmp_path, ValueError, "unknown model 'ssmamba_huge'", run, "l/m", "ssmamba_huge")

    def test_no_weights(self, tmp_path):
        self.refused(tmp_path, FileNotFoundError, r"no\.pth' does not exist", tmp_path / "no.pth", "l/m")
        self.refused(tmp_path, FileNotFoundError, "holds no weights", tmp_path, "l/m")

    def test_classes_that_do_not_fit(self, tmp_path):
        run = write_run(tmp_path / "run", num_classes=3, classes='["a", "b"]')
        self.refused(tmp_path, ValueError, "name 2 classes, and their classifier has 3", run, "l/m")

    def test_a_folder_that_is_not_empty(self, run, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")
        self.refused(tmp_path, FileExistsError, "is not empty", run, "l/m")
        assert os.listdir(tmp_path / "out") == ["precious"]

    def test_folders_that_cannot_be(self, run, tmp_path):
        (tmp_path / "file").touch()
        self.refused(tmp_path, NotADirectoryError, "is a file", run, "l/m", dry_run=tmp_path / "file")
        self.refused(tmp_path, FileNotFoundError, "mkdir -p", run, "l/m", dry_run=tmp_path / "no" / "out")
        self.refused(tmp_path, ValueError, "--dry-run is empty", run, "l/m", dry_run="")

    def test_a_disk_that_fills_leaves_nothing(self, run, tmp_path, monkeypatch):
        def full(*arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(bundle, "make_card", full)
        self.refused(tmp_path, OSError, "No space left", run, "l/m")


class TestCommandLine:
    def test_a_dry_run(self, ssmamba, run, tmp_path):
        (tmp_path / "card.yaml").write_text("license: mit\nresults: |\n  Accuracy 0.9 on ours.\ntarget_mpp: 0.25\n")
        result = ssmamba(
            "publish", run, "--repo-id", "lab/model", "--dry-run", tmp_path / "out",
            "--card-info", tmp_path / "card.yaml", "--set", "target_mpp=0.5", "--set", "hardware=two cores",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert f'timm.create_model("local-dir:{tmp_path / "out"}", pretrained=True)' in result.stdout
        assert json.loads((tmp_path / "out" / "config.json").read_text())["domain"]["target_mpp"] == 0.5
        card = (tmp_path / "out" / "README.md").read_text()
        assert "license: mit" in card
        assert "Accuracy 0.9 on ours." in card
        assert "| hardware | two cores |" in card

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("licence=mit", "unknown key 'licence' among the options; did you mean license?"),
            ("target_mpp=fine", "target_mpp is 'fine', expected a number"),
            ("target_mpp=0", "target_mpp is 0.0, expected microns per pixel"),
            ("hardware", "is not KEY=VALUE"),
        ],
    )
    def test_bad_facts(self, ssmamba, run, tmp_path, setting, message):
        result = ssmamba("publish", run, "--repo-id", "lab/model", "--dry-run", tmp_path / "out", "--set", setting)
        assert result.exit_code == 2
        assert message in result.stderr
        assert not os.listdir(tmp_path)
