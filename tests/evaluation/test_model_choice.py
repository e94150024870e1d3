"""Models by name: label, weights, and what cannot be meant."""

import pytest

from ssmamba_models.evaluation.model_choice import ModelChoice, parse_model, parse_models

pytestmark = pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("ssmamba_tiny", ("ssmamba_tiny", "ssmamba_tiny", "pretrained")),
        ("ssmamba_tiny@none", ("ssmamba_tiny-none", "ssmamba_tiny", "none")),
        ("mamim=ssmamba_tiny@runs/mamim", ("mamim", "ssmamba_tiny", "runs/mamim")),
        ("ssmamba_tiny@runs/a=b/", ("ssmamba_tiny-a_b", "ssmamba_tiny", "runs/a=b/")),
        ("x=ssmamba_tiny@a@b.safetensors", ("x", "ssmamba_tiny", "a@b.safetensors")),
        ("vit_small_patch16_224.augreg_in1k", ("vit_small_patch16_224.augreg_in1k",) * 2 + ("pretrained",)),
        ("hf-hub:owner/name@main", ("hf-hub_owner_name_main", "hf-hub:owner/name@main", "pretrained")),
        ("local-dir:/a/b=c@d", ("local-dir_a_b_c_d", "local-dir:/a/b=c@d", "pretrained")),
        ("x=local-dir:/a/b=c", ("x", "local-dir:/a/b=c", "pretrained")),
        ("color_histogram", ("color_histogram", "color_histogram", "pretrained")),
    ],
)
def test_how_a_model_is_written(text, choice):
    assert parse_model(text) == ModelChoice(*choice)


def test_init_stands_in_where_a_model_names_none():
    choices = parse_models(["a=ssmamba_tiny", "b=ssmamba_tiny@runs/x", "c=hf-hub:o/n"], init="none")
    assert [choice.init for choice in choices] == ["none", "runs/x", "none"]
    # A file of weights is not meant for a name that brings its own.
    assert parse_model("hf-hub:o/n", init="runs/x").init == "pretrained"


@pytest.mark.parametrize("text", ["", "@none", "ssmamba_tiny@", "=ssmamba_tiny", "a b=x", "a/b=x"])
def test_what_is_not_of_the_form(text):
    with pytest.raises(ValueError, match=r"not of the form \[LABEL=\]NAME\[@INIT\]"):
        parse_model(text)


def test_labels_must_differ():
    with pytest.raises(ValueError, match="two models are called 'ssmamba_tiny'; put names before"):
        parse_models(["ssmamba_tiny", "ssmamba_tiny"])
    with pytest.raises(ValueError, match="no model is named"):
        parse_models([])


def test_random_weights_vary_with_the_seed_and_nothing_else_does():
    first, again, other = (parse_model("test_ssmamba@none").load(seed, 32) for seed in (0, 0, 1))
    assert first.provenance()["weights_sha256"] == again.provenance()["weights_sha256"]
    assert first.provenance()["weights_sha256"] != other.provenance()["weights_sha256"]
    assert parse_model("test_ssmamba@none").varies
    assert not parse_model("color_histogram@none").varies
    assert not parse_model("test_ssmamba@run").varies


def save_weights(folder, seed):
    from safetensors.torch import save_file

    saved = parse_model("test_ssmamba@none").load(seed=seed)
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in saved.model.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    return saved.provenance()["weights_sha256"]


def test_several_trainings_are_one_for_each_seed(tmp_path):
    expected = [save_weights(tmp_path / name, seed) for name, seed in (("a", 3), ("b", 4))]
    choice = parse_model(f"both=test_ssmamba@{tmp_path / 'a'},{tmp_path / 'b'}")
    assert choice.varies
    assert [choice.load(seed).provenance()["weights_sha256"] for seed in (0, 1)] == expected
    choice.check_seeds(2)
    with pytest.raises(ValueError, match=r"'both' names 2 trainings .* for 3 seeds; use --seeds 2, or name"):
        choice.check_seeds(3)


@pytest.mark.parametrize(
    ("init", "text"), [("a,", "an empty place"), ("a, ,b", "an empty place"), ("a,none", "none among several")]
)
def test_what_cannot_be_several_trainings(init, text):
    with pytest.raises(ValueError, match=text):
        parse_model(f"test_ssmamba@{init}")


def test_a_path_may_hold_commas(tmp_path):
    expected = save_weights(tmp_path / "lr 1,5", 3)
    choice = parse_model(f"x=test_ssmamba@{tmp_path / 'lr 1,5'}")
    choice.check_seeds(3)
    assert not choice.varies
    assert choice.load().provenance()["weights_sha256"] == expected


@pytest.mark.parametrize("init", ["weights.safetensors", ""])
def test_weights_of_a_file_and_of_a_run_folder(tmp_path, init):
    expected = save_weights(tmp_path / "run", seed=5)
    read = parse_model(f"test_ssmamba@{tmp_path / 'run' / init}").load()
    assert read.provenance()["weights_sha256"] == expected


def test_no_published_weights_names_the_ways_out():
    ways = r"of this package, .*ssmamba_tiny.* have; write test_ssmamba@RUN .* or test_ssmamba@none"
    with pytest.raises(ValueError, match=f"no published weights; {ways}"):
        parse_model("test_ssmamba").load()


def test_unknown_names_are_left_to_the_encoder():
    with pytest.raises(ValueError, match="unknown model 'ssmamba_tinny'; did you mean"):
        parse_model("ssmamba_tinny").load()
    with pytest.raises(ValueError, match=r"unknown weights 'resnet18\.nonsense'; published are"):
        parse_model("resnet18.nonsense").load()
