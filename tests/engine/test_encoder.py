"""Encoders: any timm name, weights from where they are wanted, and errors that name the cure."""

import warnings

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from ssmamba_models.engine.device import use_bf16
from ssmamba_models.engine.encoder import RandomWeightsWarning, load_encoder, weights_sha256

# A model of ours, which takes any size, and one with a position table.
OURS, VIT = "test_ssmamba", "test_vit"

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(7)
    return timm.create_model(VIT, num_classes=5)


def test_an_encoder_turns_an_image_into_a_vector():
    encoder = load_encoder(OURS)
    images = encoder.transform(Image.new("RGB", (100, 80), "pink"))[None]
    features = encoder.embed(images)
    assert features.shape == (1, encoder.embed_dim)
    assert features.dtype == torch.float32
    assert not encoder.model.training


def test_random_weights_are_announced_and_the_seed_makes_them():
    with pytest.warns(RandomWeightsWarning, match="random weights of test_vit .*--checkpoint FILE"):
        first = load_encoder(VIT, seed=1)
    assert weights_sha256(first.model) == weights_sha256(load_encoder(VIT, seed=1).model)
    assert weights_sha256(first.model) != weights_sha256(load_encoder(VIT, seed=2).model)


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_encoder(VIT)
    assert torch.rand(1) == expected


@pytest.mark.parametrize("model", [OURS, VIT])
def test_img_size(model):
    encoder = load_encoder(model, img_size=64)
    assert encoder.data_config["input_size"] == (3, 64, 64)
    assert encoder.transform(Image.new("RGB", (100, 100))).shape == (3, 64, 64)
    assert encoder.embed(torch.zeros(2, 3, 64, 64)).shape == (2, encoder.embed_dim)


def test_bf16_is_close_to_float32():
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    exact, coarse = (load_encoder(OURS, precision=name, img_size=96).embed(images) for name in ("fp32", "bf16"))
    assert coarse.dtype == torch.float32
    assert not torch.equal(exact, coarse)
    assert torch.nn.functional.cosine_similarity(exact, coarse).min() > 0.99


def test_int8_never_becomes_another_precision():
    with pytest.raises(ValueError, match="int8 is for an SSMamba"):
        load_encoder(VIT, precision="int8", img_size=64)
    with pytest.raises(ValueError, match="precision is 'int4', expected one of auto, fp32, bf16, int8"):
        load_encoder(OURS, precision="int4")
    with pytest.raises(ValueError, match="precision is 'int8', expected one of auto, fp32, bf16"):
        use_bf16("int8", torch.device("cpu"))  # training and slides


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_checkpoint_of_a_classifier_loads_without_its_head(classifier, tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in classifier.state_dict().items()}}, path)
    else:
        save_file(classifier.state_dict(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RandomWeightsWarning)
        encoder = load_encoder(VIT, checkpoint=path)
    image = torch.randn(1, 3, 160, 160)
    expected = classifier.eval().forward_head(classifier.forward_features(image), pre_logits=True)
    assert torch.allclose(encoder.embed(image), expected, atol=1e-5)
    provenance = encoder.provenance()
    assert (provenance["weights"], provenance["checkpoint"]) == ("checkpoint", path.name)


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.encoder."])
@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("state_dict_ema",), ("state_dict", "model")])
def test_a_checkpoint_of_ours_that_a_trainer_wrapped(tmp_path, prefix, nest):
    torch.manual_seed(7)
    trained = timm.create_model(OURS, num_classes=3)
    state = {f"{prefix}{key}": value for key, value in trained.state_dict().items()}
    for key in nest:
        state = {key: state, "epoch": 3}
    torch.save(state, tmp_path / "m.pth")
    encoder = load_encoder(OURS, checkpoint=tmp_path / "m.pth")
    trained.reset_classifier(0)
    assert weights_sha256(encoder.model) == weights_sha256(trained)


@pytest.fixture
def run(tmp_path):
    """The folder of a run at 64 px, as training leaves it."""
    (tmp_path / "run").mkdir()
    torch.manual_seed(7)
    trained = timm.create_model(OURS, num_classes=0)
    metadata = {"model": OURS, "method": "mamim", "img_size": "64"}
    save_file(trained.state_dict(), tmp_path / "run" / "weights.safetensors", metadata)
    return tmp_path / "run"


def test_a_run_folder_is_a_checkpoint_at_the_size_it_was_trained_at(run):
    encoder = load_encoder(OURS, checkpoint=run)
    assert encoder.data_config["input_size"] == (3, 64, 64)
    assert encoder.provenance()["checkpoint"] == "run/weights.safetensors"
    assert encoder.provenance()["input_size"] == (3, 64, 64)
    assert load_encoder(OURS, checkpoint=run, img_size=96).data_config["input_size"] == (3, 96, 96)


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"img_size": "large"}, "says img_size 'large', expected a number of pixels"),
        ({"img_size": "0"}, "says img_size '0', expected a number of pixels"),
        ({"img_size": "true"}, "says img_size 'true', expected a number of pixels"),
        ({"model_args": "[1]"}, r"says model_args '\[1\]', expected a JSON mapping"),
        ({"classes": "3"}, "says classes '3', expected a JSON list"),
    ],
)
def test_metadata_that_make_no_sense_are_named(tmp_path, metadata, match):
    save_file(timm.create_model(OURS).state_dict(), tmp_path / "m.safetensors", metadata)
    with pytest.raises(ValueError, match=match):
        load_encoder(OURS, checkpoint=tmp_path / "m.safetensors")


def test_the_arguments_that_a_run_gave_its_model_are_given_again(tmp_path):
    trained = timm.create_model(OURS, scales=((1,), (1,), (1,), (1,)))
    metadata = {"model": OURS, "model_args": '{"scales": [[1], [1], [1], [1]]}'}
    save_file(trained.state_dict(), tmp_path / "m.safetensors", metadata)
    assert weights_sha256(load_encoder(OURS, checkpoint=tmp_path / "m.safetensors").model) == weights_sha256(trained)


def test_a_bad_checkpoint_is_found_before_a_model_is_made(monkeypatch, tmp_path):
    def never(*arguments, **options):
        raise AssertionError("a model was made")

    monkeypatch.setattr(timm, "create_model", never)
    (tmp_path / "m.pth").write_text("hello")
    with pytest.raises(ValueError, match="not a safe weight file"):
        load_encoder(OURS, checkpoint=tmp_path / "m.pth")


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'resnet1'.*did you mean.*resnet"):
        load_encoder("resnet1")


def test_unknown_tag_names_those_that_exist():
    with pytest.raises(ValueError, match=r"unknown weights 'resnet18.nope'.*resnet18.a1_in1k"):
        load_encoder("resnet18.nope")


def test_no_published_weights():
    with pytest.raises(ValueError, match=r"has no published weights.*--checkpoint"):
        load_encoder(OURS, pretrained=True)


def test_weights_that_cannot_be_fetched(monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", unreachable)
    with pytest.raises(OSError, match=r"test_vit cannot be loaded \(no route to host\).*doctor"):
        load_encoder(VIT, pretrained=True)


def test_two_sources_of_weights():
    with pytest.raises(ValueError, match="exclude each other"):
        load_encoder(VIT, pretrained=True, checkpoint="m.pth")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "hpu"])
def test_unusable_device(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used.*--device cpu"):
        load_encoder(VIT, device=device)


def test_an_impossible_size_is_found_before_the_run():
    with pytest.raises(ValueError, match=r"test_vit cannot take images of 100 x 100 px.*--img-size"):
        load_encoder(VIT, img_size=100)
