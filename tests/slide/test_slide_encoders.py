"""Slide encoders by name, saved, and read back from a folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmamba_models.models.published import WeightsError
from ssmamba_models.slide import create_slide_encoder, list_slide_encoders
from ssmamba_models.slide.slide_weights import load_slide_encoder, read_slide_config, save_slide_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name: str = "gigassl_scm", feature_dim: int = 6, **arguments):
    torch.manual_seed(0)
    return create_slide_encoder(name, feature_dim, **{"embed_dim": 8, **arguments})


@pytest.fixture
def saved(tmp_path):
    encoder = make()
    encoder.norms[0].running_mean.fill_(0.5)
    save_slide_encoder(encoder, tmp_path / "saved", {"slides": 3})
    return encoder, tmp_path / "saved"


def test_the_names():
    assert {"gigassl_scm", "gigassl_mlp", "test_gigassl"} <= set(list_slide_encoders())


@pytest.mark.parametrize("name", list_slide_encoders())
def test_every_name_makes_an_encoder_of_any_width(name):
    encoder = create_slide_encoder(name, 10)
    assert (encoder.name, encoder.arguments, encoder.feature_dim) == (name, {"feature_dim": 10}, 10)
    vectors = encoder.eval()(torch.randn(2, 5, 10), torch.arange(20.0).view(2, 5, 2))
    assert vectors.shape == (2, encoder.embed_dim)
    vector = encoder.embed(torch.randn(5, 10), torch.arange(10.0).view(5, 2), seed=1)
    assert vector.shape == (encoder.embed_dim,)
    assert vector.isfinite().all()


def test_a_folder_gives_the_encoder_back(saved):
    encoder, folder = saved
    for again in (load_slide_encoder(folder), create_slide_encoder("gigassl_scm", 6, pretrained=folder)):
        assert (again.name, again.arguments) == (encoder.name, encoder.arguments)
        torch.testing.assert_close(again.state_dict(), encoder.state_dict(), rtol=0, atol=0)
    assert not load_slide_encoder(folder).training
    config = read_slide_config(folder)
    assert config["metadata"] == {"slides": 3}
    assert config["arguments"] == {"feature_dim": 6, "embed_dim": 8}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_same_encoder_gives_the_same_bytes_and_replaces_another(saved, tmp_path):
    encoder, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "log.jsonl").touch()
    save_slide_encoder(make("gigassl_mlp"), folder)
    assert load_slide_encoder(folder).name == "gigassl_mlp"
    save_slide_encoder(encoder, folder, {"slides": 3})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {**before, "log.jsonl": b""}


@pytest.mark.parametrize(
    "step", ["pathlib.Path.write_bytes", "pathlib.Path.write_text", "os.fsync", "os.replace"]
)
def test_until_both_files_are_written_the_old_encoder_stays(saved, monkeypatch, step):
    encoder, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_, **__):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(OSError, match="is full"):
            save_slide_encoder(make("gigassl_mlp"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert load_slide_encoder(folder).name == encoder.name


def test_weights_of_another_encoder_than_config_speaks_of_are_refused(saved, tmp_path):
    encoder, folder = saved
    encoder.norms[0].running_mean.fill_(1.0)
    save_slide_encoder(encoder, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(WeightsError, match="are not those that were published"):
        load_slide_encoder(folder)


def test_tensors_that_do_not_fit_are_named(saved):
    _, folder = saved
    with pytest.raises(ValueError, match=r"down.weight has shape \(9, 6, 8\), expected \(9, 6, 16\)"):
        create_slide_encoder("gigassl_scm", 6, pretrained=folder, embed_dim=16)
    state = load_file(folder / "model.safetensors")
    state["extra"] = state.pop("shortcut.weight")
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["domain"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"shortcut\.weight is missing; extra is unknown"):
        load_slide_encoder(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        load_slide_encoder(folder)


def test_what_is_asked_for_must_be_what_is_there(saved, tmp_path):
    _, folder = saved
    with pytest.raises(ValueError, match="holds 'gigassl_scm', not 'gigassl_mlp'"):
        create_slide_encoder("gigassl_mlp", 6, pretrained=folder)
    with pytest.raises(ValueError, match="tile features of length 6, and feature_dim is 7"):
        create_slide_encoder("gigassl_scm", 7, pretrained=folder)
    with pytest.raises(WeightsError, match=r"is no folder with a config\.json"):
        load_slide_encoder(tmp_path / "missing")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "ssmamba_small"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="holds no slide encoder, but 'ssmamba_small'"):
        load_slide_encoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"arguments": {}}, "which features its encoder takes"), ({"metadata": 3}, '"metadata" in .* are no mapping')],
)
def test_a_config_that_was_edited(saved, change, words):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=words):
        load_slide_encoder(folder)


def test_nothing_is_written_of_what_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError, match="cannot be stored as JSON"):
        save_slide_encoder(make(), tmp_path / "new", {"loss": float("nan")})
    nameless = type(make())(6)
    with pytest.raises(ValueError, match="has no name in the registry"):
        save_slide_encoder(nameless, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "gigassl"}, "unknown slide encoder 'gigassl'; did you mean"),
        ({"name": "vim"}, "there are: gigassl_scm"),
        ({"pretrained": True}, "no weights of 'gigassl_scm' are published; train it"),
        ({"feature_dim": 0}, "feature_dim is 0, expected 1 or more"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"embed_dim": "8"}, "embed_dim of slide encoder 'gigassl_scm' is '8', expected a whole number"),
        ({"embed_dim": 8.0}, "is 8.0, expected a whole number"),
        ({"dtype": "float16"}, "is 'float16', expected a torch.dtype"),
        ({"name": "pama_small", "kro": "no"}, "kro of slide encoder 'pama_small' is 'no', expected true or false"),
        ({"name": "pama_small", "mlp_ratio": True}, "is True, expected a number"),
        ({"depth": 3}, "'gigassl_scm' has no argument 'depth'; it has: device, dtype, embed_dim"),
    ],
)
def test_arguments_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        make(**arguments)
